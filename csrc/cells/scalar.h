// What math.h and the cells need of a number type that is float or double: in a CUDA thread, and where
// a cell's header is compiled alone.
#pragma once

#include "cells/number.h"

namespace rnnfast::RNNFAST_TARGET {

template <class V>
struct Traits;
template <>
struct Traits<float> {
  using bits = int;
};
template <>
struct Traits<double> {
  using bits = long long;
};
template <class V>
using scalar_of = V;
template <class V>
using bits_of = typename Traits<V>::bits;

template <class V>
RNNFAST_INLINE V splat(V x) {
  return x;
}

RNNFAST_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
RNNFAST_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

}  // namespace rnnfast::RNNFAST_TARGET

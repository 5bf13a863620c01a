// What math.h and the cells need of a number in a CUDA thread.
#pragma once

#include "cuda/device.h"

namespace rnnfast::cuda {

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

template <class To, class From>
RNNFAST_INLINE To bit_cast(From v) {
  return __builtin_bit_cast(To, v);
}

template <class V>
RNNFAST_INLINE V splat(V x) {
  return x;
}

RNNFAST_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
RNNFAST_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

// A NaN stays a NaN.
template <class V>
RNNFAST_INLINE V at_least(V x, V low) {
  return x < low ? low : x;
}
template <class V>
RNNFAST_INLINE V at_most(V x, V high) {
  return x > high ? high : x;
}

// x where a < b, elsewhere y.
template <class V>
RNNFAST_INLINE V where_less(V a, V b, V x, V y) {
  return a < b ? x : y;
}

using rnnfast::widen;

template <class T>
RNNFAST_INLINE T narrow(Real<T> x) {
  return rnnfast::narrow<T>(x);
}
template <>
RNNFAST_INLINE Float16 narrow<Float16>(float x) {
  return narrow_to_half(x);
}

}  // namespace rnnfast::cuda

#define RNNFAST_TARGET cuda
#include "cells/math.h"

#include "cells/cells.h"

namespace rnnfast::cuda {

// The block of H rows in torch's weights that belongs to gate `number` of a window.
template <class Cell, int first, int last>
RNNFAST_INLINE int weight_block(int number) {
  constexpr int block = Cell::weight_block[first];
  if constexpr (first + 1 >= last) {
    return block;
  } else {
    return number == 0 ? block : weight_block<Cell, first + 1, last>(number - 1);
  }
}

// Calls f(std::integral_constant) for each slot from first to last, so that slots stay in registers.
template <int number>
struct Number {
  static constexpr int value = number;
};
template <int first, int last, class F>
RNNFAST_INLINE void for_slots(const F& f) {
  if constexpr (first < last) {
    f(Number<first>{});
    for_slots<first + 1, last>(f);
  }
}

}  // namespace rnnfast::cuda

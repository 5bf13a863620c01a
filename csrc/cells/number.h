// What every number type has in common: a float, a double, or a vector of them.
#pragma once

#include "core/numbers.h"

namespace rnnfast::RNNFAST_TARGET {

template <class To, class From>
RNNFAST_INLINE To bit_cast(From v) {
  return __builtin_bit_cast(To, v);
}

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

}  // namespace rnnfast::RNNFAST_TARGET

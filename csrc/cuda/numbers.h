// What math.h and the cells need of a number type in a CUDA thread.
#pragma once

#include "cuda/device.h"

namespace rnnfast::cuda {

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
#include "cells/scalar.h"
#include "cells/math.h"

#include "cells/cells.h"

namespace rnnfast::cuda {

template <int number>
struct Number {
  static constexpr int value = number;
};
// Calls f(Number<slot>{}) for the slots from `first` to before `last`. Slots with constant numbers stay
// in registers.
template <int first, int last, class F>
RNNFAST_INLINE void for_slots(const F& f) {
  if constexpr (first < last) {
    f(Number<first>{});
    for_slots<first + 1, last>(f);
  }
}

// The block of H rows in torch's weights that belongs to gate `number` of the window [first, last).
template <class Cell, int first, int last>
RNNFAST_INLINE int weight_block(int number) {
  int block = 0;
  for_slots<first, last>([&](auto slot) {
    constexpr int candidate = Cell::weight_block[slot.value];
    if (number == slot.value - first) block = candidate;
  });
  return block;
}

}  // namespace rnnfast::cuda

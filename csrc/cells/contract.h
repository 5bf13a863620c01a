// What the header of every cell includes. Where RNNFAST_TARGET is not defined, as in an editor or in a
// program that tries a formula out, the number types are float and double, in the namespace `alone`.
#pragma once

#include "cells/info.h"
#include "core/numbers.h"

#if !defined(RNNFAST_TARGET)
#define RNNFAST_TARGET alone
#include "cells/scalar.h"
#include "cells/math.h"
#endif

namespace rnnfast::RNNFAST_TARGET {

// A range of gates.
struct Window {
  int begin, end;
  constexpr int width() const { return end - begin; }
  constexpr bool has(int slot) const { return begin <= slot && slot < end; }
};

}  // namespace rnnfast::RNNFAST_TARGET

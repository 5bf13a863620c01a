// The threads that share a call.
#pragma once

#include "core/numbers.h"

namespace rnnfast {

// How a call is shared among threads: by rows of the batch (no barrier in the time loop) or by blocks
// of hidden units (one barrier a step).
enum class Split { rows, units };

struct Barrier {
  alignas(64) int waiting;
  alignas(64) int generation;
};

// How many of its steps, in its order, a member of a team has done.
struct Progress {
  alignas(64) index steps;
};

struct Team {
  int rank, size;
  Split split;
  Barrier* barrier;  // the team's own, and one more for each half of it

  // In a wavefront over layers, otherwise null: the members of the team, as large as this one, whose
  // outputs or gradients of inputs this one reads, and this one's own for the team that reads its.
  const Progress* source = nullptr;
  Progress* own = nullptr;

  bool in_wavefront() const { return source || own; }
};

inline constexpr int barriers = 3;

// The steps that a team of a wavefront does between a look at its source and the next: few, so that
// all teams soon have work, but some rows for the tiles of the products over steps.
RNNFAST_INLINE index wavefront_steps(index steps, index batch) {
  constexpr index pieces = 16, least_rows = 6;
  const index least = least_rows / (batch + 1) + 1;
  return steps / pieces > least ? steps / pieces : least;
}

}  // namespace rnnfast

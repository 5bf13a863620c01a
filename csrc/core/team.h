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

// How many steps a member of a team has done, in its order of processing.
struct Progress {
  alignas(64) index steps;
};

struct Team {
  int rank, size;
  Split split;
  Barrier* barrier;  // [barriers]: one for the team, then one for each half of the team

  // In a wavefront over layers, otherwise null. `source` is the progress of the team whose outputs or
  // gradients of inputs this team reads; both teams have the same size. `progress` is the progress of
  // this team, for the team that reads from it.
  const Progress* source = nullptr;
  Progress* progress = nullptr;

  bool in_wavefront() const { return source || progress; }
};

inline constexpr int barriers = 3;

// How many steps a team of a wavefront does before it waits for its source again: few, so that all
// teams soon have work, but enough rows to fill the tiles of the products over steps.
RNNFAST_INLINE index wavefront_steps(index steps, index batch) {
  constexpr index pieces = 16, least_rows = 6;
  const index least = least_rows / (batch + 1) + 1;
  return steps / pieces > least ? steps / pieces : least;
}

}  // namespace rnnfast

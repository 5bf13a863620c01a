// How a call is shared among threads: as a cost model says, or as a test or a benchmark forces it.
#pragma once

#include "core/team.h"

namespace rnnfast {

// What is shared among threads: nothing (one thread computes everything), the rows of the batch, the
// hidden units, the two directions, or the layers of a stack, each a few steps behind the layer that it
// reads. `chosen`: the cost model decides.
enum class Partition { chosen, one, rows, units, directions, wavefront };

// From now on every call has this partition wherever it can. `oversubscribe` allows more threads than
// processors: eight, or four for each processor where that is more.
void force(Partition partition, bool oversubscribe);
Partition forced_partition();

struct Usage {
  Partition partition;
  int threads;
};
void note(Usage usage);
Usage last_usage();  // of the last call of any thread

// How many of `threads` threads a call may use: at least one.
int usable(int threads);

inline constexpr double region_seconds = 3e-6;  // to start several threads and to wait for them

struct Plan {
  int threads;
  Split split;
  double seconds;
};

// What the cost of a layer depends on.
struct Work {
  index steps, batch, rows;  // rows of all steps: fewer than steps * batch where some end early
  index inputs, hidden, outputs;
  int weight_blocks;
  int products;             // dependent products in a step
  bool packed;              // whether the caller holds packed weights
  index item_bytes, lanes;  // bytes of a number; numbers in a vector
  int matrix_rows;          // rows that a matrix unit multiplies at once; 0: there is none
};

// The best plan for `threads` threads: one of them alone, rows or units.
Plan plan(const Work& work, int threads);

// Whether the L2 caches of `threads` cores hold the recurrent weights, each core its part.
bool fits_cache(const Work& work, int threads);

}  // namespace rnnfast

// How calls are shared among threads: a cost model, or what a test or a benchmark asks for.
#pragma once

#include "core/team.h"

namespace rnnfast {

// Who computes what: one thread all of it; several each some rows of the batch, some hidden units, one
// of the two directions, or some layers of a stack, a few steps behind the one that is read.
enum class Partition { chosen, one, rows, units, directions, wavefront };

// From now on every call is shared so wherever it can be; `chosen` leaves it to the cost model. And
// whether also among more threads than there are processors, up to four times as many.
void force(Partition partition, bool oversubscribe);
Partition asked();

struct Used {
  Partition partition;
  int threads;
};
void note(Used used);
Used last_used();  // by any thread's call

// How many of so many threads are of use: at least one.
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
  int products;        // dependent ones in a step
  bool held;           // whether the weights are packed already
  index item, vector;  // bytes of a number, and how many of them a vector computes
};

// The best way for so many threads: one of them, rows or units.
Plan plan(const Work& work, int threads);

// Whether the second-level cache of each of so many cores holds its part of the recurrent weights.
bool fits_cache(const Work& work, int threads);

}  // namespace rnnfast

// How fast this machine does what limits a step, measured. Only the time in which a thread has a core
// counts. Other processes may still take caches and memory, and so lower a rate: the largest of several
// measurements is the best.
#pragma once

#include <functional>

#include "core/numbers.h"
#include "cpu/memory.h"

namespace rnnfast {

// Calls run(rank, rounds) on `threads` threads, again and again for about `seconds`, at least once. The
// sum over the threads of all that a thread's calls returned, by second.
double rate(const std::function<double(int rank, long rounds)>& run, int threads, double seconds);

// Memory that threads read, each its own part of `bytes` bytes, which are whole lines of 64 bytes.
class ReadBuffers {
 public:
  ReadBuffers(index bytes, int threads);

  // Reads the part of a thread `rounds` times, and returns the bytes. It goes up and down in memory in
  // turns, as the time loops do, so that what was read last is read from the nearest cache.
  double read(int rank, long rounds) const;

 private:
  const char* part(int rank) const { return static_cast<const char*>(memory_.data()) + bytes_ * rank; }

  index bytes_;
  Memory memory_;
};

}  // namespace rnnfast

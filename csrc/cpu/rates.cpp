#include "cpu/rates.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/contention.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/threads.h"

namespace rnnfast {

double rate(const std::function<double(int rank, long rounds)>& run, int threads, double seconds) {
  constexpr double least_seconds = 50e-6;  // of one run, so that the time of the clocks does not count
  const auto clock = [](clockid_t id) { return 1e-9 * static_cast<double>(clock_of(id)); };
  const double start = clock(CLOCK_MONOTONIC);
  threads = usable(threads);
  std::vector<double> rates(static_cast<std::size_t>(threads));
  run_parallel(threads, [&](int rank, int) {
    double begin = clock(CLOCK_THREAD_CPUTIME_ID), done = 0;
    for (long rounds = 1;;) {
      const double before = clock(CLOCK_THREAD_CPUTIME_ID);
      done += run(rank, rounds);
      const double now = clock(CLOCK_THREAD_CPUTIME_ID);
      if (now - before < least_seconds) {  // starts anew, with longer runs
        rounds *= 2;
        begin = now;
        done = 0;
      } else if (clock(CLOCK_MONOTONIC) - start >= seconds) {
        rates[static_cast<std::size_t>(rank)] = done / (now - begin);
        return;
      }
    }
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

ReadBuffers::ReadBuffers(index bytes, int threads)
    : bytes_(bytes), memory_(static_cast<std::size_t>(bytes) * static_cast<std::size_t>(threads)) {
  std::memset(memory_.data(), 1, memory_.size());  // memory without a page of its own reads as zeros
}

double ReadBuffers::read(int rank, long rounds) const {
  for (long n = 0; n < rounds; ++n) kernels().read_lines(part(rank), bytes_, n % 2 == 1);
  return static_cast<double>(bytes_) * static_cast<double>(rounds);
}

}  // namespace rnnfast

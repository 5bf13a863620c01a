#include "cpu/threads.h"

#include <omp.h>
#include <pthread.h>

#include <thread>

namespace rnnfast {
namespace {

// OpenMP's threads do not survive a fork, and a parallel region in the child would wait for them for
// ever. A thread that the child starts has no OpenMP threads yet, and can start its own.
bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int max_threads() { return omp_get_max_threads(); }

int processors() { return omp_get_num_procs(); }

void run_parallel(int threads, const std::function<void(int rank, int count)>& work) {
  const auto region = [&] {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
  };
  if (forked)
    std::thread(region).join();
  else
    region();
}

}  // namespace rnnfast

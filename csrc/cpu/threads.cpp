#include "cpu/threads.h"

#include <pthread.h>

#include <thread>

// Of libgomp, GCC's OpenMP runtime. GCC turns `#pragma omp parallel` into a call of GOMP_parallel.
// Clang calls a runtime of its own, whose threads and number of threads are not those of torch. It also
// has no omp.h for libgomp.
extern "C" {
int omp_get_max_threads();
int omp_get_num_procs();
int omp_get_num_threads();
int omp_get_thread_num();
void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
}

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
  using Work = std::function<void(int, int)>;
  const auto on_each = [](void* data) noexcept {
    (**static_cast<const Work**>(data))(omp_get_thread_num(), omp_get_num_threads());
  };
  const auto region = [&] {
    const Work* data = &work;
    GOMP_parallel(on_each, &data, static_cast<unsigned>(threads), 0);
  };
  if (forked)
    std::thread(region).join();
  else
    region();
}

}  // namespace rnnfast

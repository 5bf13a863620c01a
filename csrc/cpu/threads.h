// The threads of the process. The package runs on OpenMP's (threads.cpp), so that it shares them with
// torch; the sanitizers, which cannot follow those of libgomp, have others (tests/support/sanitizers).
#pragma once

#include <functional>

namespace rnnfast {

int max_threads();  // that a call may use by default
int processors();   // that this process may run on

// Calls work(rank, threads there) on each of so many threads, or as many as there can be, and returns
// when all have returned. What they wrote is then seen by all.
void run_parallel(int threads, const std::function<void(int rank, int there)>& work);

}  // namespace rnnfast

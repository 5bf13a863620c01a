// The threads of the process. The package uses the threads of OpenMP (threads.cpp), so that it shares
// them with torch. The sanitizers cannot follow libgomp, and use other threads
// (tests/support/sanitizers).
#pragma once

#include <functional>

namespace rnnfast {

int max_threads();  // the threads that a call may use by default
int processors();   // the processors that this process may run on

// Calls work(rank, count) on each of `count` threads: `threads`, or fewer where there cannot be so
// many. Returns when all calls have returned; what they wrote is then visible to all threads.
void run_parallel(int threads, const std::function<void(int rank, int count)>& work);

}  // namespace rnnfast

// What the core takes from the process, in the place of csrc/cpu/threads.cpp and memory.cpp: threads
// that the sanitizers can follow, and memory of exactly the size that was asked for. It is filled with
// NaN: what is read before it is written shows.
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "cpu/threads.h"
#include "guarded.h"

namespace rnnfast {

int max_threads() { return 2; }

int processors() { return 2; }

void run_parallel(int threads, const std::function<void(int rank, int there)>& work) {
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank)
    others.emplace_back([&work, rank, threads] { work(rank, threads); });
  work(0, threads);
  for (std::thread& other : others) other.join();
}

Memory::Memory(std::size_t bytes, std::size_t) : bytes_(bytes), room_(bytes) {
  data_ = allocate(bytes, 64);
  std::memset(data_, 0xff, bytes);
}

Memory::~Memory() { release(data_, bytes_); }

}  // namespace rnnfast

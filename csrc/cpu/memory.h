// Memory for scratch and for what goes from forward to backward. A freed block is kept for the next
// Memory: memory fresh from the system costs a page fault for every 4 KiB, and allocators return large
// blocks to the system at once. Every step of a training loop would pay as much for its pages as for a
// fifth of its arithmetic.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace rnnfast {

// The words are those of torch's own error. Programs look for them, and then try a smaller batch.
struct OutOfMemory : std::runtime_error {
  explicit OutOfMemory(std::size_t bytes)
      : std::runtime_error("DefaultCPUAllocator: can't allocate memory: rnnfast tried to allocate " +
                           std::to_string(bytes) + " bytes") {}
};

class Memory {
 public:
  // Takes a kept block of at most `waste` times the size, or a new one. Throws OutOfMemory.
  explicit Memory(std::size_t bytes, std::size_t waste = 2);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }  // aligned to a cache line; uninitialised
  std::size_t size() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_, room_;
};

// Returns all kept blocks to the system.
void release_memory();

}  // namespace rnnfast

// Memory for scratch and for what goes from forward to backward. A block that is given back is kept for
// the next taker: memory fresh from the system costs a page fault for every 4 KiB, and allocators hand
// large blocks back at once, so that every step of a training loop would pay as much for its pages as
// for a fifth of its arithmetic.
#pragma once

#include <cstddef>

namespace rnnfast {

class Memory {
 public:
  // A kept block may be `waste` times as large as what is asked for. Throws std::bad_alloc.
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

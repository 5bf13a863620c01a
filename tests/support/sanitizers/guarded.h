// Memory of the driver's tensors and of the core. On request every block ends or begins at a guard: a
// page that nobody may touch. A program that touches a guard stops, also without a sanitizer.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace rnnfast {

enum class Guards { none, at_end, at_start };

// For all blocks; call it before the first one. A program that touches a guard prints `doing` and ends.
void use_guards(Guards guards);

// What the program does now.
extern std::string doing;

// A block of exactly this size. Throws std::bad_alloc. With guards at the end, up to `alignment` - 1
// bytes lie between the block and the guard.
void* allocate(std::size_t bytes, std::size_t alignment);
void release(void* block, std::size_t bytes);

template <class T>
struct Guarded {
  using value_type = T;
  Guarded() = default;
  template <class U>
  Guarded(const Guarded<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(rnnfast::allocate(count * sizeof(T), alignof(T)));
  }
  void deallocate(T* block, std::size_t count) { release(block, count * sizeof(T)); }
  bool operator==(const Guarded&) const = default;
};

template <class T>
using Numbers = std::vector<T, Guarded<T>>;

}  // namespace rnnfast

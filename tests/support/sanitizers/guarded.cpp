#include "guarded.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace rnnfast {

std::string doing = "nothing";

namespace {

Guards kind = Guards::none;

const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

// Of a block, its guards included.
std::size_t room(std::size_t bytes) { return (bytes + page - 1) / page * page + 2 * page; }

void stop(int) {
  const std::string text = "touches memory outside of its buffers: " + doing + "\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text.data(), text.size());
  _exit(3);
}

}  // namespace

void use_guards(Guards guards) {
  kind = guards;
  if (kind != Guards::none) signal(SIGSEGV, stop);
}

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (kind == Guards::none) {
    void* block = nullptr;
    if (posix_memalign(&block, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    return block;
  }
  void* begin = mmap(nullptr, room(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) throw std::bad_alloc();
  char* first = static_cast<char*>(begin) + page;
  const std::size_t inside = room(bytes) - 2 * page;
  if (inside && mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  return kind == Guards::at_start ? first : first + (inside - bytes) / alignment * alignment;
}

void release(void* block, std::size_t bytes) {
  if (kind == Guards::none) return std::free(block);
  const auto address = reinterpret_cast<std::uintptr_t>(block);
  munmap(reinterpret_cast<void*>(address / page * page - page), room(bytes));
}

}  // namespace rnnfast

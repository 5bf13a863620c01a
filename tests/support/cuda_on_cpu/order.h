// What the thread sanitizer is told of the emulated threads, which all run in one thread of the CPU:
// each is a thread of its own, and only the kernels' barriers put their accesses in an order. Without
// the sanitizer these functions do nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define RNNFAST_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define RNNFAST_THREAD_SANITIZER
#endif
#endif

#if defined(RNNFAST_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>

// Functions of the sanitizer's runtime that it has no header for.
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_write_range(void*, unsigned long);
}
#endif

namespace rnnfast::cuda::order {

#if defined(RNNFAST_THREAD_SANITIZER)

inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void* create_thread() { return __tsan_create_fiber(0); }
inline void destroy_thread(void* thread) { __tsan_destroy_fiber(thread); }
// Right before the stacks change.
inline void switch_to(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }

// What a thread did before release(place) comes before what a thread does after acquire(place), where
// the acquire is later.
inline void release(const void* place) { __tsan_release(const_cast<void*>(place)); }
inline void acquire(const void* place) { __tsan_acquire(const_cast<void*>(place)); }

// This thread counts as a writer of this memory.
inline void write(void* memory, std::size_t bytes) { __tsan_write_range(memory, bytes); }

// While it lives the sanitizer does not see what this thread reads and writes: the emulator's own data.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

#else

inline void* this_thread() { return nullptr; }
inline void* create_thread() { return nullptr; }
inline void destroy_thread(void*) {}
inline void switch_to(void*) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void write(void*, std::size_t) {}
struct Unseen {
  Unseen() {}
};

#endif

}  // namespace rnnfast::cuda::order

// How threads share work and wait for each other. The threads of a call form a Team. Every output
// element is computed by exactly one thread, and its value does not depend on which.
#pragma once

#include <sched.h>

#include "core/team.h"
#include "cpu/denormals.h"

namespace rnnfast::RNNFAST_TARGET {

struct Range {
  index begin, end;
  constexpr index size() const { return end - begin; }
};

// Part `part` of [0, n) in `parts` nearly equal parts.
constexpr Range share(index n, int parts, int part) {
  return {n * part / parts, n * (part + 1) / parts};
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns when ready() holds. It spins, since a sleeping thread waits a time slice to wake on a busy
// core. After some time it yields its core, which the other thread may need.
template <class Ready>
RNNFAST_INLINE void spin_until(Ready ready) {
  constexpr int spins_before_yield = 2000;
  for (int spins = 0; !ready(); ++spins) {
    if (spins < spins_before_yield)
      pause();
    else
      sched_yield();
  }
}

// Returns when the whole team has arrived; what any member wrote before is then visible to all members.
inline void wait(const Team& team) {
  if (team.size == 1) return;
  Barrier& b = *team.barrier;
  const int generation = __atomic_load_n(&b.generation, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&b.waiting, 1, __ATOMIC_ACQ_REL) == team.size) {
    __atomic_store_n(&b.waiting, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&b.generation, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  spin_until([&] { return __atomic_load_n(&b.generation, __ATOMIC_ACQUIRE) != generation; });
}

// Returns when all members of the source team have done `steps` steps; what they wrote before is then
// visible.
inline void wait_for_source(const Team& team, index steps) {
  if (!team.source) return;
  for (int k = 0; k < team.size; ++k)
    spin_until([&] { return __atomic_load_n(&team.source[k].steps, __ATOMIC_ACQUIRE) >= steps; });
}

// Tells the team that reads from this one that this member has done `steps` steps.
inline void have_done(const Team& team, index steps) {
  if (team.progress) __atomic_store_n(&team.progress[team.rank].steps, steps, __ATOMIC_RELEASE);
}

// Hands out aligned pieces of one allocation, null for a count of zero. With a null base it only
// counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(index count) {
    const index offset = used_;
    used_ += (count * static_cast<index>(sizeof(T)) + alignment - 1) / alignment * alignment;
    return base_ && count > 0 ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }
  index used() const { return used_; }

 private:
  static constexpr index alignment = 64;
  char* base_;
  index used_ = 0;
};

}  // namespace rnnfast::RNNFAST_TARGET

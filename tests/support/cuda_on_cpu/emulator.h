// The device of csrc/cuda/device.h on the CPU: every CUDA thread is a fiber with a stack of its own.
// They run one at a time and change only where a thread waits, in an order that is shuffled whenever
// all have had their turn, so that a missing barrier shows as a wrong number. Shared memory and
// everything else that a kernel finds uninitialised is filled with NaNs. A group that waits for nobody
// is reported. cuda_runtime.h is the device's runtime.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/plan.h"
#include "cuda/recurrence.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace rnnfast::cuda {

// How many fibers have come to a meeting, and how often all had.
struct Meeting {
  unsigned come = 0, held = 0;
};

struct Warp {
  Meeting meeting;
  float* d[32];
  const unsigned *a[32], *b[32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread = 0, block = 0;
  bool done = false;
  const volatile unsigned* watched = nullptr;  // runs again when this has come to `until`
  unsigned until = 0;
};

// The blocks that run together.
class Emulator {
 public:
  Emulator(int first_block, int blocks, int threads, int shared_bytes, unsigned order)
      : first_block_(first_block),
        threads_(threads),
        shared_bytes_(shared_bytes),
        random_(order),
        blocks_(blocks),
        warps_(blocks * threads / 32),
        fibers_(blocks * threads) {
    for (int block = 0; block < blocks; ++block) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 16, std::max(shared_bytes, 16))) throw std::bad_alloc();
      std::memset(memory, 0xff, shared_bytes);
      shared_.emplace_back(static_cast<unsigned char*>(memory), &std::free);
    }
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    running = this;
    std::vector<Fiber*> order;
    for (int i = 0; i < static_cast<int>(fibers_.size()); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.thread = i % threads_;
      fiber.block = i / threads_;
      fiber.stack = std::make_unique_for_overwrite<char[]>(stack_bytes);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Emulator::enter, 0);
      order.push_back(&fiber);
    }
    for (bool progress = true; progress;) {
      std::shuffle(order.begin(), order.end(), random_);
      progress = false;
      for (Fiber* fiber : order) {
        if (fiber->done || (fiber->watched && static_cast<int>(*fiber->watched - fiber->until) < 0))
          continue;
        fiber->watched = nullptr;
        current_ = fiber;
        progress = true;
        swapcontext(&scheduler_, &fiber->context);
      }
    }
    running = nullptr;
    for (const Fiber& fiber : fibers_)
      if (!fiber.done) throw std::runtime_error("emulator: blocks wait for each other for ever");
  }

  Fiber& current() { return *current_; }
  Warp& warp() { return warps_[current_->block * threads_ / 32 + current_->thread / 32]; }
  Meeting& block_meeting() { return blocks_[current_->block]; }
  Meeting& cluster_meeting() { return cluster_; }
  int threads() const { return threads_; }
  int all_threads() const { return static_cast<int>(fibers_.size()); }
  int block() const { return first_block_ + current_->block; }

  void wait(const volatile unsigned* watched, unsigned until) {
    current_->watched = watched;
    current_->until = until;
    swapcontext(&current_->context, &scheduler_);
  }

  void meet(Meeting& meeting, int all) {
    if (static_cast<int>(++meeting.come) == all) {
      meeting.come = 0;
      ++meeting.held;
    } else {
      wait(&meeting.held, meeting.held + 1);
    }
  }

  unsigned char* shared() { return shared_[current_->block].get(); }
  unsigned char* shared_of(const void* address, int rank) {
    const auto offset = static_cast<const unsigned char*>(address) - shared();
    if (offset < 0 || offset > shared_bytes_ || rank < 0 || rank >= static_cast<int>(shared_.size()))
      throw std::runtime_error("emulator: no such shared memory in the cluster");
    return shared_[rank].get() + offset;
  }

  static inline Emulator* running = nullptr;
  static inline unsigned seed = 0;

 private:
  static constexpr std::size_t stack_bytes = 128 << 10;

  static void enter() {
    (*running->kernel_)();
    running->current_->done = true;
  }

  const int first_block_, threads_, shared_bytes_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> shared_;
  std::vector<Meeting> blocks_;
  Meeting cluster_;
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
};

inline Emulator& emulator() { return *Emulator::running; }

inline int thread() { return emulator().current().thread; }
inline int threads() { return emulator().threads(); }
inline int block() { return emulator().block(); }
inline unsigned char* shared_memory() { return emulator().shared(); }
inline void sync_block() { emulator().meet(emulator().block_meeting(), threads()); }
inline void sync_cluster() { emulator().meet(emulator().cluster_meeting(), emulator().all_threads()); }

template <class T>
T* shared_of(T* address, int rank) {
  return reinterpret_cast<T*>(emulator().shared_of(address, rank));
}

inline void meet(unsigned* counter, unsigned target) {
  sync_block();
  if (thread() == 0) {
    ++*counter;
    if (static_cast<int>(*counter - target) < 0) emulator().wait(counter, target);
  }
  sync_block();
}

struct alignas(16) Words {
  unsigned word[4];
};

inline Words load_fresh(const Words* from) { return *from; }
inline float load_fresh(const float* from) { return *from; }
inline double load_fresh(const double* from) { return *from; }

inline float widen(Float16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
inline Float16 narrow_to_half(float x) {
  return {__builtin_bit_cast(std::uint16_t, static_cast<_Float16>(x))};
}

inline unsigned to_tf32(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// Number i of a row of a fragment's words.
inline float number_of(const unsigned* words, int i, float) {
  return __builtin_bit_cast(float, words[i] & 0xffffe000);
}
inline float number_of(const unsigned* words, int i, Bfloat16) {
  return __builtin_bit_cast(float, (words[i / 2] >> 16 * (i % 2)) << 16);
}
inline float number_of(const unsigned* words, int i, Float16) {
  return widen(Float16{static_cast<std::uint16_t>(words[i / 2] >> 16 * (i % 2))});
}

// The fragments as the PTX ISA describes them for m16n8k16, and m16n8k8 of TF32: lane l has rows l / 4
// and l / 4 + 8 of A, column l / 4 of B, and of k the word l % 4 in both halves; of D the columns
// 2 (l % 4) and the next.
template <class T>
void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
  constexpr int pair = 4 / sizeof(T);
  Warp& warp = emulator().warp();
  const int lane = thread() % 32;
  warp.d[lane] = d;
  warp.a[lane] = a;
  warp.b[lane] = b;
  if (warp.meeting.come == 31) {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float sum = 0;
        for (int k = 0; k < 8 * pair; ++k) {
          const int half = k / (4 * pair), word = k % (4 * pair) / pair, i = k % pair;
          const unsigned* a_words = warp.a[row % 8 * 4 + word] + row / 8 + 2 * half;
          const unsigned* b_words = warp.b[column * 4 + word] + half;
          sum += number_of(a_words, i, T{}) * number_of(b_words, i, T{});
        }
        warp.d[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] += sum;
      }
  }
  emulator().meet(warp.meeting, 32);
}

}  // namespace rnnfast::cuda

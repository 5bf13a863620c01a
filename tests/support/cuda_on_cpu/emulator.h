// The device of csrc/cuda/device.h on the CPU: every CUDA thread is a fiber with a stack of its own.
// They run one at a time and change only where a thread waits, in an order that is shuffled whenever
// all have had their turn, so that a missing barrier shows as a wrong number. Shared memory and
// everything else that a kernel finds uninitialised is filled with NaNs. A group that waits for nobody
// is reported. cuda_runtime.h is the device's runtime.
//
// Under the thread sanitizer (order.h) a missing barrier is reported whatever the order of the fibers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/plan.h"
#include "cuda/recurrence.h"
#include "order.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace rnnfast::cuda {

// How many fibers have come to a meeting, and how often all had. A fiber that leaves late may find that
// others have come again: so alternate meetings have different places of order.
struct Meeting {
  unsigned come = 0, held = 0;
  char places[2];
};

struct Warp {
  Meeting meeting;
  float* d[32];
  const unsigned *a[32], *b[32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* as_thread = nullptr;
  int thread = 0, block = 0;
  int ends = 0;                                // 1 when it has done all
  const volatile unsigned* watched = nullptr;  // runs again when this has come to `until`
  unsigned until = 0;
};

struct Block {
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  Meeting meeting;
  int begun = 0, ended = 0;  // fibers
  char begin, end;           // places of order
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
    for (Block& block : blocks_) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 16, std::max(shared_bytes, 16))) throw std::bad_alloc();
      std::memset(memory, 0xff, shared_bytes);
      block.shared.reset(static_cast<unsigned char*>(memory));
    }
  }

  void run(const std::function<void()>& kernel) {
    const order::Unseen own;
    kernel_ = &kernel;
    running = this;
    scheduler_as_thread_ = order::this_thread();
    std::vector<Fiber*> turns;
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
      fiber.as_thread = order::create_thread();
      turns.push_back(&fiber);
    }
    for (bool progress = true; progress;) {
      std::shuffle(turns.begin(), turns.end(), random_);
      progress = false;
      for (Fiber* fiber : turns) {
        if (fiber->ends || (fiber->watched && static_cast<int>(*fiber->watched - fiber->until) < 0))
          continue;
        fiber->watched = nullptr;
        current_ = fiber;
        progress = true;
        order::switch_to(fiber->as_thread);
        swapcontext(&scheduler_, &fiber->context);
      }
    }
    running = nullptr;
    for (const Fiber& fiber : fibers_) {
      if (!fiber.ends) throw std::runtime_error("emulator: blocks wait for each other for ever");
      order::acquire(&fiber.ends);
      order::destroy_thread(fiber.as_thread);
    }
  }

  Fiber& current() { return *current_; }
  Warp& warp() { return warps_[current_->block * threads_ / 32 + current_->thread / 32]; }
  Meeting& block_meeting() { return blocks_[current_->block].meeting; }
  Meeting& cluster_meeting() { return cluster_; }
  int threads() const { return threads_; }
  int all_threads() const { return static_cast<int>(fibers_.size()); }
  int block() const { return first_block_ + current_->block; }

  void wait(const volatile unsigned* watched, unsigned until) {
    current_->watched = watched;
    current_->until = until;
    order::switch_to(scheduler_as_thread_);
    swapcontext(&current_->context, &scheduler_);
  }

  // Waits for `all` fibers, but puts nothing in order.
  void gather(Meeting& meeting, int all) {
    const order::Unseen own;
    if (static_cast<int>(++meeting.come) == all) {
      meeting.come = 0;
      ++meeting.held;
    } else {
      wait(&meeting.held, meeting.held + 1);
    }
  }

  void meet(Meeting& meeting, int all) {
    const char* place = &meeting.places[meeting.held % 2];
    order::release(place);
    gather(meeting, all);
    order::acquire(place);
  }

  void count(unsigned* counter) {
    const order::Unseen own;
    ++*counter;
    order::release(&counted_[counter].emplace_back());
  }

  void wait_for(const unsigned* counter, unsigned target) {
    const order::Unseen own;
    if (static_cast<int>(*counter - target) < 0) wait(counter, target);
    // Only what had been counted when the target was reached.
    const auto& places = counted_[counter];
    for (unsigned i = 0; i < std::min<std::size_t>(target, places.size()); ++i)
      order::acquire(&places[i]);
  }

  unsigned char* shared() { return blocks_[current_->block].shared.get(); }
  unsigned char* shared_of(const void* address, int rank) {
    const auto offset = static_cast<const unsigned char*>(address) - shared();
    if (offset < 0 || offset > shared_bytes_ || rank < 0 || rank >= static_cast<int>(blocks_.size()))
      throw std::runtime_error("emulator: no such shared memory in the cluster");
    return blocks_[rank].shared.get() + offset;
  }

  static inline Emulator* running = nullptr;
  static inline unsigned seed = 0;

 private:
  static constexpr std::size_t stack_bytes = 128 << 10;

  static void enter() {
    Fiber& fiber = *running->current_;
    Block& block = running->blocks_[fiber.block];
    running->begin(block);
    (*running->kernel_)();
    running->end(block);
    running->leave(fiber);
  }

  // A block's shared memory exists from the begin of its first thread to the end of its last. Another
  // block that uses it before or after has no order to these writes.
  void begin(Block& block) {
    if (counts_to(block.begun, 1)) {
      order::write(block.shared.get(), shared_bytes_);
      order::release(&block.begin);
    }
    order::acquire(&block.begin);
  }
  void end(Block& block) {
    order::release(&block.end);
    if (!counts_to(block.ended, threads_)) return;
    order::acquire(&block.end);
    order::write(block.shared.get(), shared_bytes_);
  }
  static bool counts_to(int& counter, int last) {
    const order::Unseen own;
    return ++counter == last;
  }
  void leave(Fiber& fiber) {
    void* const thread = scheduler_as_thread_;
    counts_to(fiber.ends, 1);
    order::release(&fiber.ends);  // reads and writes no more
    order::switch_to(thread);
    setcontext(&scheduler_);
  }

  const int first_block_, threads_, shared_bytes_;
  std::mt19937 random_;
  std::vector<Block> blocks_;
  Meeting cluster_;
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  std::map<const unsigned*, std::deque<char>> counted_;  // places of order, one for each count
  ucontext_t scheduler_;
  void* scheduler_as_thread_ = nullptr;
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

inline void count(unsigned* counter) { emulator().count(counter); }
inline void wait_for(const unsigned* counter, unsigned target) { emulator().wait_for(counter, target); }

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
  const order::Unseen own;
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
  emulator().gather(warp.meeting, 32);
}

}  // namespace rnnfast::cuda

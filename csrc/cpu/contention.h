// How many threads a call should use while other processes want the cores too.
//
// A call ends when its last thread does. If that thread has to share its core, the other threads wait
// for its next time slice, which may come after a hundred times the length of the call. So each call of
// several threads measures how long they were kept off their cores. Where fewer threads would have done
// the work sooner, the next calls use fewer threads, for a time that is long beside the time lost. Then
// all threads are tried again. A call that is long beside a time slice keeps its threads: half a core
// still halves its work.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rnnfast {

using nanoseconds = std::int64_t;

inline nanoseconds clock_of(clockid_t id) {
  timespec t;
  clock_gettime(id, &t);
  return nanoseconds{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

class Contention {
 public:
  // How many of `threads` threads a call should use now.
  int limit(int threads) const {
    const nanoseconds until = until_.load(std::memory_order_relaxed);
    if (until == 0 || clock_of(CLOCK_MONOTONIC) >= until) return threads;
    return std::min(threads, limit_.load(std::memory_order_relaxed));
  }

  // A call of several threads. Each thread makes a Share.
  class Call {
   public:
    // `is_long`: whether the call is worth measuring processor time, which costs 0.3 microseconds.
    explicit Call(bool is_long) : is_long_(is_long), start_(clock_of(CLOCK_MONOTONIC)) {}

    bool was_contended() const { return kept_off_.load(std::memory_order_relaxed) > 0; }

   private:
    friend class Contention;
    const bool is_long_;
    const nanoseconds start_;
    std::atomic<int> kept_off_{0};  // the number of threads that were kept off their cores
    std::atomic<nanoseconds> loss_{0}, work_{0};  // time off the core and on it, of these threads
  };

  // The work of one thread of a call, from construction to destruction.
  class Share {
   public:
    explicit Share(Call& call)
        : call_(call),
          begin_(clock_of(CLOCK_MONOTONIC)),
          cpu_begin_(call.is_long_ ? clock_of(CLOCK_THREAD_CPUTIME_ID) : 0) {}
    ~Share() {
      const nanoseconds end = clock_of(CLOCK_MONOTONIC), delay = begin_ - call_.start_;
      const nanoseconds work = call_.is_long_ ? clock_of(CLOCK_THREAD_CPUTIME_ID) - cpu_begin_ : 0;
      const nanoseconds loss = delay + (call_.is_long_ ? end - begin_ - work : 0);
      if (loss < least_loss || loss * 4 < end - call_.start_) return;
      call_.kept_off_.fetch_add(1, std::memory_order_relaxed);
      call_.loss_.fetch_add(loss, std::memory_order_relaxed);
      call_.work_.fetch_add(work, std::memory_order_relaxed);
    }

   private:
    static constexpr nanoseconds least_loss =
        1'500'000;  // half a time slice; waking a thread takes 0.1 ms

    Call& call_;
    const nanoseconds begin_, cpu_begin_;
  };

  // Sets the limit for the next calls, after a contended call of `threads` threads.
  void learn(const Call& call, int threads) {
    const int kept_off = call.kept_off_.load(std::memory_order_relaxed);
    const int fewer = std::max(1, threads - kept_off);
    const nanoseconds now = clock_of(CLOCK_MONOTONIC);
    const nanoseconds work = call.work_.load(std::memory_order_relaxed) / kept_off;
    if ((now - call.start_) * 4 < threads * work / fewer * 5) return;
    const nanoseconds until = until_.load(std::memory_order_relaxed);
    const bool resting = now < until;  // the call had another caller, or fewer threads
    // Contention soon after the last rest makes the next rest longer. Every machine stops a thread now
    // and then.
    int patience = patience_.load(std::memory_order_relaxed);
    if (!resting) patience = call.start_ - until < soon ? std::min(2 * patience, 64) : 2;
    const nanoseconds rest = std::min(most_rest, patience * call.loss_.load(std::memory_order_relaxed));
    limit_.store(resting ? std::min(fewer, limit_.load(std::memory_order_relaxed)) : fewer,
                 std::memory_order_relaxed);
    until_.store(std::max(until, now + rest), std::memory_order_relaxed);
    patience_.store(patience, std::memory_order_relaxed);
  }

 private:
  static constexpr nanoseconds soon = 30'000'000, most_rest = 1'000'000'000;

  std::atomic<nanoseconds> until_{0};
  std::atomic<int> limit_{1}, patience_{2};
};

}  // namespace rnnfast

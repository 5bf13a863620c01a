// How many threads are worth having while other processes want the cores too.
//
// A call ends when its last thread does. If that one has to share its core, the others wait for its
// next time slice, which may be a hundred times as long as the call. So each call with several threads
// measures how long they were kept off their cores; where the others would have done the work sooner,
// the next calls do without as many threads, for a time that is long beside what was lost. Then all are
// tried again. A call that is long beside a time slice never would: half a core still halves its work.
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
  // The most of `threads` that a call should use now.
  int limit(int threads) const {
    const nanoseconds until = until_.load(std::memory_order_relaxed);
    if (until == 0 || clock_of(CLOCK_MONOTONIC) >= until) return threads;
    return std::min(threads, limit_.load(std::memory_order_relaxed));
  }

  // A call of several threads. Each of them makes a Share for as long as it works.
  class Call {
   public:
    // `is_long`: worth asking for processor time, which costs a third of a microsecond.
    explicit Call(bool is_long) : is_long_(is_long), start_(clock_of(CLOCK_MONOTONIC)) {}

    bool was_contended() const { return kept_off_.load(std::memory_order_relaxed) > 0; }

   private:
    friend class Contention;
    const bool is_long_;
    const nanoseconds start_;
    std::atomic<int> kept_off_{0};  // threads
    std::atomic<nanoseconds> lost_{0};
    std::atomic<nanoseconds> worked_{0};  // by the threads that were kept off
  };

  class Share {
   public:
    explicit Share(Call& call)
        : call_(call),
          begin_(clock_of(CLOCK_MONOTONIC)),
          ran_(call.is_long_ ? clock_of(CLOCK_THREAD_CPUTIME_ID) : 0) {}
    ~Share() {
      const nanoseconds end = clock_of(CLOCK_MONOTONIC), late = begin_ - call_.start_;
      const nanoseconds worked = call_.is_long_ ? clock_of(CLOCK_THREAD_CPUTIME_ID) - ran_ : 0;
      const nanoseconds off = call_.is_long_ ? end - begin_ - worked : 0;
      if (late + off < least || (late + off) * 4 < end - call_.start_) return;
      call_.kept_off_.fetch_add(1, std::memory_order_relaxed);
      call_.lost_.fetch_add(late + off, std::memory_order_relaxed);
      call_.worked_.fetch_add(worked, std::memory_order_relaxed);
    }

   private:
    static constexpr nanoseconds least = 1'500'000;  // half a time slice; waking a thread takes 0.1 ms

    Call& call_;
    const nanoseconds begin_, ran_;
  };

  // What a call of `threads` threads, some of which were kept off their cores, says of the next ones.
  void learn(const Call& call, int threads) {
    const int kept_off = call.kept_off_.load(std::memory_order_relaxed);
    const int fewer = std::max(1, threads - kept_off);
    const nanoseconds now = clock_of(CLOCK_MONOTONIC);
    const nanoseconds each = call.worked_.load(std::memory_order_relaxed) / kept_off;
    if ((now - call.start_) * 4 < threads * each / fewer * 5) return;
    const nanoseconds until = until_.load(std::memory_order_relaxed);
    const bool resting = now < until;  // another caller's call, or one of fewer threads
    // Again, soon after the last rest: longer. Once in a while every machine stops a thread.
    int patience = patience_.load(std::memory_order_relaxed);
    if (!resting) patience = call.start_ - until < soon ? std::min(2 * patience, 64) : 2;
    const nanoseconds rest = std::min(most_rest, patience * call.lost_.load(std::memory_order_relaxed));
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

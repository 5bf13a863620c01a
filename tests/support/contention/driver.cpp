// What csrc/cpu/contention.h concludes from calls of two threads, one of which is kept off its core: here it
// sleeps. Prints how many threads the next call may have.
#include "cpu/contention.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>

using namespace rnnfast;
using std::chrono::milliseconds;

// One thread works for `work` milliseconds of processor time; the other as long, and is off for `off`.
static void call_of_two(Contention& contention, int work, int off) {
  const auto compute = [&](Contention::Call& call, int sleep) {
    const Contention::Share share(call);
    std::this_thread::sleep_for(milliseconds(sleep));
    const nanoseconds start = clock_of(CLOCK_THREAD_CPUTIME_ID);
    while (clock_of(CLOCK_THREAD_CPUTIME_ID) - start < work * 1'000'000L) {
    }
  };
  Contention::Call call(true);
  std::thread other([&] { compute(call, off); });
  compute(call, 0);
  other.join();
  if (call.was_contended()) contention.learn(call, 2);
}

int main() {
  // Short beside what was lost: one thread alone would have been done long before.
  Contention contention;
  std::printf("before %d\n", contention.limit(2));
  call_of_two(contention, 1, 40);
  std::printf("short %d\n", contention.limit(2));
  std::this_thread::sleep_for(milliseconds(500));
  std::printf("later %d\n", contention.limit(2));
  // Long: alone it would have worked longer than both together waited. Other processes may really keep
  // the threads off, so one of some tries counts.
  int most = 0;
  for (int n = 0; n < 30 && most < 2; ++n) {
    Contention fresh;
    call_of_two(fresh, 100, 50);
    most = std::max(most, fresh.limit(2));
  }
  std::printf("long %d\n", most);
}

// The treatment of denormal numbers, which every kernel shares.
#pragma once

#include "core/numbers.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rnnfast {

// Flushes denormals to zero while it lives, and then restores the caller's setting. Denormals of
// decaying states make some CPUs tens of times slower.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  RNNFAST_INLINE FlushDenormals() : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ | 0x8040);
  }  // FTZ and DAZ
  RNNFAST_INLINE ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  RNNFAST_INLINE FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));  // FZ
  }
  RNNFAST_INLINE ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  unsigned long long saved_;
#endif
};

}  // namespace rnnfast

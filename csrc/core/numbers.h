// The number types of kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnnfast {

using index = std::ptrdiff_t;

// A bfloat16 in memory: the upper half of a float32.
struct Bfloat16 {
  std::uint16_t bits;
};

// A float32 in memory, which products read as the sum of n bfloat16 numbers.
template <int n>
struct InParts {
  float number;
};

// The type that numbers of type T are computed in: the type of sums, gates and cell states.
template <class T>
struct RealOf {
  using type = T;
};
template <>
struct RealOf<Bfloat16> {
  using type = float;
};
template <int n>
struct RealOf<InParts<n>> {
  using type = float;
};
template <class T>
using Real = typename RealOf<T>::type;

// Inlining is forced, since translation units of different instruction sets must share no function.
#if defined(__CUDACC__)
#define RNNFAST_INLINE __device__ __forceinline__
#else
#define RNNFAST_INLINE inline __attribute__((always_inline))
#endif

template <class T>
RNNFAST_INLINE Real<T> widen(T x) {
  return x;
}
RNNFAST_INLINE float widen(Bfloat16 x) {
  return __builtin_bit_cast(float, std::uint32_t{x.bits} << 16);
}

// Rounds to nearest, ties to even.
template <class T>
RNNFAST_INLINE T narrow(Real<T> x) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    return T{x};
  } else {
    auto bits = __builtin_bit_cast(std::uint32_t, x);  // not const: nvcc 13.0 rejects it
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<std::uint16_t>(x == x ? rounded : bits >> 16 | 0x40)};
  }
}

}  // namespace rnnfast

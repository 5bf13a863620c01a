// The vector type of the instruction set being compiled, in the language's own vector extension, and
// what math.h and the kernels need of it. RNNFAST_VECTOR_BYTES and RNNFAST_TARGET (the namespace that
// keeps the translation units of different instruction sets apart) come from the build.
#pragma once

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../layer.h"

#define RNNFAST_INLINE inline __attribute__((always_inline))

namespace rnnfast::RNNFAST_TARGET {

template <class T>
inline constexpr int lanes = RNNFAST_VECTOR_BYTES / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class V>
struct Traits;
template <>
struct Traits<Vector<float>> {
  using scalar = float;
  using bits = Vector<int>;
  static constexpr int vectors = 1;
};
template <>
struct Traits<Vector<double>> {
  using scalar = double;
  using bits = Vector<long long>;
  static constexpr int vectors = 1;
};
template <class V>
using scalar_of = typename Traits<V>::scalar;
template <class V>
using bits_of = typename Traits<V>::bits;

template <class To, class From>
RNNFAST_INLINE To bit_cast(From v) {
  return __builtin_bit_cast(To, v);
}

template <class V>
RNNFAST_INLINE V splat(scalar_of<V> x) {
  if constexpr (Traits<V>::vectors == 2)
    return {splat<decltype(V::a)>(x), splat<decltype(V::a)>(x)};
  else
    return x - V{};  // not x + V{}: that would turn -0 into +0
}

// a * b + c in one rounding where the instruction set can. Spelled out, since the compiler's own
// contraction may fuse either product of a * b + c * d, and not the same one in every copy of a
// function.
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr bool fused = true;
#else
inline constexpr bool fused = false;
#endif
#if defined(__AVX512F__)
RNNFAST_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
RNNFAST_INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
RNNFAST_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
RNNFAST_INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__aarch64__)
RNNFAST_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
RNNFAST_INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
RNNFAST_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

// A NaN stays a NaN: these instructions return their second operand where either is one. The language's
// own `x < low ? low : x` becomes a comparison and a blend, with a detour through mask registers.
#if defined(__AVX512F__)
RNNFAST_INLINE Vector<float> clamp(Vector<float> x, Vector<float> low, Vector<float> high) {
  return _mm512_min_ps(high, _mm512_max_ps(low, x));
}
RNNFAST_INLINE Vector<double> clamp(Vector<double> x, Vector<double> low, Vector<double> high) {
  return _mm512_min_pd(high, _mm512_max_pd(low, x));
}
#else
template <class V>
RNNFAST_INLINE V clamp(V x, V low, V high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
#endif

// x where test is positive, elsewhere zero.
template <class V>
RNNFAST_INLINE V where_positive(V test, V x) {
  return test > V{} ? x : V{};
}

template <class T>
RNNFAST_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
RNNFAST_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Copies n < lanes elements in pieces of constant size, each a plain move.
template <class T>
RNNFAST_INLINE void copy_some(T* to, const T* from, index n) {
#pragma GCC unroll 8
  for (int piece = lanes<T> / 2; piece > 0; piece /= 2) {
    if (n & piece) {
      __builtin_memcpy(to, from, piece * sizeof(T));
      to += piece;
      from += piece;
    }
  }
}

// The first n elements; the other lanes are zero. Nothing past them is touched.
template <class T>
RNNFAST_INLINE Vector<T> load_some(const T* p, index n) {
  if (n >= lanes<T>) return load(p);
  Vector<T> v{};
  copy_some(reinterpret_cast<T*>(&v), p, n);
  return v;
}

template <class T>
RNNFAST_INLINE void store_some(T* p, Vector<T> v, index n) {
  if (n >= lanes<T>) return store(p, v);
  copy_some(p, reinterpret_cast<const T*>(&v), n);
}

// The first n lanes of v; the others become zero, whatever they held.
template <class T>
RNNFAST_INLINE Vector<T> first_lanes(Vector<T> v, index n) {
  return load_some(reinterpret_cast<const T*>(&v), n);
}

// Lanes [half * lanes / 2, ...) of a and b, alternating: a0 b0 a1 b1 ...
template <class V, int... k>
RNNFAST_INLINE V interleave(V a, V b, int half, std::integer_sequence<int, k...>) {
  constexpr int n = sizeof...(k);
  return half == 0 ? __builtin_shufflevector(a, b, (k / 2 + (k % 2) * n)...)
                   : __builtin_shufflevector(a, b, (n / 2 + k / 2 + (k % 2) * n)...);
}

// Turns v[row][lane] into v[lane][row]: log2(lanes) rounds of the perfect shuffle.
template <class T>
RNNFAST_INLINE void transpose(Vector<T> (&v)[lanes<T>]) {
  constexpr int n = lanes<T>;
  using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 8
  for (int round = 1; round < n; round *= 2) {
    Vector<T> w[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      w[2 * i] = interleave(v[i], v[i + n / 2], 0, Lanes{});
      w[2 * i + 1] = interleave(v[i], v[i + n / 2], 1, Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = w[i];
  }
}

}  // namespace rnnfast::RNNFAST_TARGET

// The vector type of the instruction set being compiled, made with the compiler's vector extension, and
// what math.h and the kernels need of it. The build defines RNNFAST_VECTOR_BYTES and RNNFAST_TARGET,
// the namespace that keeps the translation units of different instruction sets apart.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cells/number.h"

namespace rnnfast::RNNFAST_TARGET {

template <class T>
inline constexpr int lanes = RNNFAST_VECTOR_BYTES / sizeof(Real<T>);

// One vector. For bfloat16 it is a vector of float32, the type that bfloat16 is computed in.
template <class T>
struct VectorOf {
  typedef Real<T> type __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
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

template <class T>
inline constexpr bool is_bfloat16 = false;
template <>
inline constexpr bool is_bfloat16<Bfloat16> = true;

// The parts of a number of InParts; 0: of another type.
template <class T>
inline constexpr int parts_of = 0;
template <int n>
inline constexpr int parts_of<InParts<n>> = n;

template <class V>
RNNFAST_INLINE V splat(scalar_of<V> x) {
  if constexpr (Traits<V>::vectors == 2)
    return {splat<decltype(V::a)>(x), splat<decltype(V::a)>(x)};
  else
    return x - V{};  // not x + V{}: that would turn -0 into +0
}

// a * b + c, rounded once where the instruction set can. The kernels call it explicitly: if the
// compiler contracted a * b + c * d, it might fuse a different product in every copy of a function.
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

// A NaN stays a NaN: these instructions return their second operand where either operand is a NaN. GCC
// compiles `x < low ? low : x` to a comparison and a blend where low is a constant.
#if defined(__AVX512F__)
RNNFAST_INLINE Vector<float> at_least(Vector<float> x, Vector<float> low) {
  return _mm512_max_ps(low, x);
}
RNNFAST_INLINE Vector<double> at_least(Vector<double> x, Vector<double> low) {
  return _mm512_max_pd(low, x);
}
RNNFAST_INLINE Vector<float> at_most(Vector<float> x, Vector<float> high) {
  return _mm512_min_ps(high, x);
}
RNNFAST_INLINE Vector<double> at_most(Vector<double> x, Vector<double> high) {
  return _mm512_min_pd(high, x);
}
#elif defined(__AVX__)
RNNFAST_INLINE Vector<float> at_least(Vector<float> x, Vector<float> low) {
  return _mm256_max_ps(low, x);
}
RNNFAST_INLINE Vector<double> at_least(Vector<double> x, Vector<double> low) {
  return _mm256_max_pd(low, x);
}
RNNFAST_INLINE Vector<float> at_most(Vector<float> x, Vector<float> high) {
  return _mm256_min_ps(high, x);
}
RNNFAST_INLINE Vector<double> at_most(Vector<double> x, Vector<double> high) {
  return _mm256_min_pd(high, x);
}
#endif

// The same for vectors as widen and narrow of one number.
using rnnfast::narrow;
using rnnfast::widen;
typedef std::uint16_t Halves __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));

RNNFAST_INLINE Vector<float> widen(Halves h) {
  return bit_cast<Vector<float>>(__builtin_convertvector(h, Vector<std::uint32_t>) << 16);
}

RNNFAST_INLINE Halves narrow(Vector<float> v) {
#if defined(__AVX512BF16__)
  return bit_cast<Halves>(_mm512_cvtneps_pbh(v));
#else
  using Bits = Vector<std::uint32_t>;
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16 | 0x40), Halves);
#endif
}

template <class T>
RNNFAST_INLINE Vector<T> load(const T* p) {
  if constexpr (is_bfloat16<T>) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h);
  } else {
    Vector<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T>
RNNFAST_INLINE void store(T* p, Vector<T> v) {
  if constexpr (is_bfloat16<T>) {
    const Halves h = narrow(v);
    __builtin_memcpy(p, &h, sizeof h);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// v as it would be after store and load.
template <class T>
RNNFAST_INLINE Vector<T> rounded(Vector<T> v) {
  if constexpr (is_bfloat16<T>)
    return widen(narrow(v));
  else
    return v;
}

// Prefetches what lies at p into the L2 cache. p may be any address.
template <class T>
RNNFAST_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
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

// Loads the first n elements; the other lanes are zero. Memory past them is not read.
template <class T>
RNNFAST_INLINE Vector<T> load_some(const T* p, index n) {
  if (n >= lanes<T>) return load(p);
  T numbers[lanes<T>] = {};
  copy_some(numbers, p, n);
  return load(static_cast<const T*>(numbers));
}

template <class T>
RNNFAST_INLINE void store_some(T* p, Vector<T> v, index n) {
  if (n >= lanes<T>) return store(p, v);
  T numbers[lanes<T>];
  store(numbers, v);
  copy_some(p, static_cast<const T*>(numbers), n);
}

// The first n lanes of v; the other lanes become zero, even where v has a NaN there.
template <class T>
RNNFAST_INLINE Vector<T> first_lanes(Vector<T> v, index n) {
  return load_some(reinterpret_cast<const Real<T>*>(&v), n);
}

// From each 16 bytes (q numbers) of a and b, the numbers of the lower or upper half, alternating: a0 b0
// a1 b1.
template <int q, class V, int... k>
RNNFAST_INLINE V interleave(V a, V b, int half, std::integer_sequence<int, k...>) {
  constexpr int n = sizeof...(k);
  return half == 0 ? __builtin_shufflevector(a, b, (k - k % q + k % q / 2 + k % 2 * n)...)
                   : __builtin_shufflevector(a, b, (k - k % q + q / 2 + k % q / 2 + k % 2 * n)...);
}

// The pieces of q numbers in a, then in b, that have even or odd positions.
template <int q, class V, int... k>
RNNFAST_INLINE V every_other(V a, V b, int odd, std::integer_sequence<int, k...>) {
  return odd == 0 ? __builtin_shufflevector(a, b, (k / q * 2 * q + k % q)...)
                  : __builtin_shufflevector(a, b, (k / q * 2 * q + q + k % q)...);
}

// Lane k of the result is lane k + shift of v.
template <int shift, class V, int... k>
RNNFAST_INLINE V rotated(V v, std::integer_sequence<int, k...>) {
  constexpr int n = sizeof...(k);
  return __builtin_shufflevector(v, v, ((k + shift) % n)...);
}

// Sums of lanes, in one order: lane k of the result is the sum of lanes k, k + n, k + 2 n and so on.
template <class T, int n, int half = lanes<T> / 2>
RNNFAST_INLINE Vector<T> sums_of_every(Vector<T> v) {
  if constexpr (half < n)
    return v;
  else
    return sums_of_every<T, n, half / 2>(v +
                                         rotated<half>(v, std::make_integer_sequence<int, lanes<T>>{}));
}

// The sum of all lanes, in one order.
template <class T>
RNNFAST_INLINE Real<T> sum_of_lanes(Vector<T> v) {
  return sums_of_every<T, 1>(v)[0];
}

// Turns v[row][lane] into v[lane][row]: perfect shuffles of q rows within 16 bytes, then of pieces of
// 16 bytes. As many shuffles across all lanes would do, but they need indices in registers and
// overwrite an operand.
template <class V, int n>
RNNFAST_INLINE void transpose(V (&v)[n]) {
  using Lanes = std::make_integer_sequence<int, n>;
  constexpr int q = n * 16 / int{sizeof(V)}, pieces = n / q;
  V w[n];
#pragma GCC unroll 8
  for (int round = 1; round < q; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      const int begin = i / (q / 2) * q, k = i % (q / 2);
      w[begin + 2 * k] = interleave<q>(v[begin + k], v[begin + k + q / 2], 0, Lanes{});
      w[begin + 2 * k + 1] = interleave<q>(v[begin + k], v[begin + k + q / 2], 1, Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = w[i];
  }
#pragma GCC unroll 8
  for (int round = 1; round < pieces; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      const int piece = i / q, k = i % q;
      const V &a = v[2 * piece * q + k], &b = v[(2 * piece + 1) * q + k];
      w[piece * q + k] = every_other<q>(a, b, 0, Lanes{});
      w[(piece + pieces / 2) * q + k] = every_other<q>(a, b, 1, Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = w[i];
  }
}

// --- words -------------------------------------------------------------------------------------------
//
// A word is what a lane multiplies at once: one number, or two numbers of bfloat16 that are neighbours
// along the sum. The products of the two are added in float32.

template <class T>
inline constexpr int per_word = is_bfloat16<T> || parts_of<T> > 0 ? 2 : 1;
template <class T>
constexpr index words(index numbers) {
  return (numbers + per_word<T> - 1) / per_word<T>;
}

template <class T>
struct WordsOf {
  using type = Vector<T>;
};
template <>
struct WordsOf<Bfloat16> {
  using type = Vector<int>;
};
template <class T>
using Words = typename WordsOf<T>::type;

template <class T>
RNNFAST_INLINE Words<T> load_words(const T* p) {
  Words<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// Loads the first n numbers; the others are zero.
template <class T>
RNNFAST_INLINE Words<T> load_some_words(const T* p, index n) {
  constexpr index size = lanes<T> * per_word<T>;
  if constexpr (per_word<T> == 1) return load_some(p, n);
  if (n >= size) return load_words(p);
  T numbers[size] = {};
  for (index k = 0; k < n; ++k) numbers[k] = p[k];
  return load_words(static_cast<const T*>(numbers));
}
template <class T>
RNNFAST_INLINE void store_words(T* p, Words<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The word at p in all lanes.
template <class T>
RNNFAST_INLINE Words<T> repeat_word(const T* p) {
  if constexpr (is_bfloat16<T>) {
    int word;
    __builtin_memcpy(&word, p, sizeof word);
    return word - Vector<int>{};
  } else {
    return splat<Vector<T>>(*p);
  }
}

// c + a b, lane by lane.
template <class T>
RNNFAST_INLINE Vector<T> multiply_add(Words<T> a, Words<T> b, Vector<T> c) {
  if constexpr (is_bfloat16<T>) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
    const auto low = [](Vector<int> v) { return bit_cast<Vector<float>>(v << 16); };
    const auto high = [](Vector<int> v) { return bit_cast<Vector<float>>(v & ~0xffff); };
    return fma(high(a), high(b), fma(low(a), low(b), c));
#endif
  } else {
    return fma(a, b, c);
  }
}

// Each word has the numbers of one lane of `low` and of `high`.
RNNFAST_INLINE Vector<int> pair(Halves low, Halves high) {
  using Bits = Vector<std::uint32_t>;
  return bit_cast<Vector<int>>(__builtin_convertvector(low, Bits) | __builtin_convertvector(high, Bits)
                                                                        << 16);
}

}  // namespace rnnfast::RNNFAST_TARGET

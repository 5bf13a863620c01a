// The squares of the gradients of states, of which core/gradient_norms.h makes norms.
#pragma once

#include "core/layer.h"
#include "cpu/kernels/states.h"
#include "cpu/kernels/vector_pair.h"

namespace rnnfast::RNNFAST_TARGET {

// As many vectors as numbers of T lie in 16 bytes.
template <class T>
inline constexpr int vectors_at_once = 16 / int{sizeof(Real<T>)};

template <class T>
using Several = Vector<T>[vectors_at_once<T>];

// The sums of the lanes of several vectors, in the first lanes of the result. The order of each sum is
// the same, whatever the other vectors are. One vector alone takes two instructions for each halving of
// its lanes; here the first halvings serve two vectors each.
template <class T>
RNNFAST_INLINE Vector<T> sums_of_lanes(Several<T>& v) {
  using Lanes = std::make_integer_sequence<int, lanes<T>>;
  constexpr int q = vectors_at_once<T>;
#pragma GCC unroll 4
  for (int half = q / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i)
      v[i] =
          interleave<q>(v[i], v[i + half], 0, Lanes{}) + interleave<q>(v[i], v[i + half], 1, Lanes{});
  return sums_of_every<T, q>(v[0]);
}

// Whether float32 holds a sum of squares, or each of a vector of sums: none of its larger terms
// underflowed, and it did not overflow.
template <class Sum>
RNNFAST_INLINE auto float32_holds(Sum sum) {
  return (sum > 1e-30f) & (sum < 1e38f);
}

// Computes the sums that float32 does not hold again, in float64.
template <class T>
[[gnu::noinline]] void sums_of_squares_in_double(double* sums, const Vector<T>* v) {
  for (int i = 0; i < vectors_at_once<T>; ++i) {
    if (float32_holds(static_cast<float>(sums[i]))) continue;
    sums[i] = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) sums[i] += double{v[i][lane]} * double{v[i][lane]};
  }
}

// The sums of the squares of the lanes of several vectors. Sums that float32 does not hold are taken in
// float64: they are those of numbers below 1e-15 or above 1e19. A square that underflows beside a sum
// of 1e-30 is below the rounding of float32.
template <class T>
RNNFAST_INLINE void sums_of_squares(double* sums, const Several<T>& v) {
  constexpr int q = vectors_at_once<T>;
  Several<T> squares;
#pragma GCC unroll 4
  for (int i = 0; i < q; ++i) squares[i] = v[i] * v[i];
  const Vector<T> all = sums_of_lanes<T>(squares);
  if constexpr (q == 4) {
    typedef float Four __attribute__((vector_size(16)));
    typedef double Doubles __attribute__((vector_size(32)));
    typedef long long Two __attribute__((vector_size(16)));
    const Four four = __builtin_shufflevector(all, all, 0, 1, 2, 3);
    const auto numbers = __builtin_convertvector(four, Doubles);
    __builtin_memcpy(sums, &numbers, sizeof numbers);
    const auto held = (Two)float32_holds(four);
    if ((held[0] & held[1]) != -1) [[unlikely]]
      sums_of_squares_in_double<T>(sums, v);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < q; ++i) sums[i] = all[i];
  }
}

// Where the squares of one block of units at one step go: one number for each row. Null: not wanted.
struct Squares {
  double *h = nullptr, *c = nullptr;
  Deal deal;  // gives the place of a row

  explicit operator bool() const { return h || c; }
};

// Writes the sums of the squares of the first `units` lanes of dh and dc, the gradients of one row b or
// of two.
template <class T, class V>
RNNFAST_INLINE void write_squares(const Squares& to, const index* b, V dh, V dc, index units) {
  constexpr int q = vectors_at_once<T>, rows = Traits<V>::vectors;
  Vector<T> v[4];
  double sums[4];
  scatter(dh, [&](int r, Vector<T> part) { v[r] = v[1] = part; });
  scatter(dc, [&](int r, Vector<T> part) { v[2 + r] = v[3] = part; });
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    if (units < lanes<T>) v[i] = first_lanes<T>(v[i], units);
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += q) sums_of_squares<T>(sums + i, reinterpret_cast<Several<T>&>(v[i]));
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r) {
    const index row = to.deal.row(b[r]);
    if (to.h) to.h[row] = sums[r];
    if (to.c) to.c[row] = sums[2 + r];
  }
}

// write_squares as a function call. Inlined behind the formula of an LSTM, which fills the registers,
// it makes every training slower, with squares or without.
template <class T, class V>
[[gnu::noinline]] void call_write_squares(const Squares& to, const index* b, V dh, V dc, index units) {
  write_squares<T>(to, b, dh, dc, units);
}

}  // namespace rnnfast::RNNFAST_TARGET

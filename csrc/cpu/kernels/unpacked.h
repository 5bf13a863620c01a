// The product of product.h for a few rows and for weights that are read only once or twice, as in a
// single step. The weights are transposed in registers and used at once: to write them to a panel and
// to read the panel would cost more than the product. The sequence of operations of every element is
// that of tile().
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::RNNFAST_TARGET {

inline constexpr int unpacked_tile_rows = 8;  // rows that share one transposition
// How often a product may transpose its weights: with more transpositions it is faster to pack.
inline constexpr index most_transpositions = 2;

// One gate of a block of units. w is its first row of weights, `next` the row that is read after the
// gate; `init` is as in tile(). S slices of the sum run side by side, since one or two rows alone have
// too few independent accumulators. All gates side by side would do as well, but read 64 rows of
// weights in turn, which is more than processors prefetch.
//
// Tried: half the shuffles, by 16-byte inserts from memory, are up to 40 percent slower from the
// last-level cache.
// Tried: software prefetch within the same rows is 10 percent slower.
// Tried: a loop without bounds checks for full blocks is 30 percent slower, since the compiler spills.
template <class T, int R, int S>
void unpacked_gate(const T* const* a, Matrix<const T> w, const T* next, index depth, index units,
                   Real<T>* const* c, const Real<T>* init) {
  constexpr int L = lanes<T>, per = per_word<T>;
  const index all = words<T>(depth);
  for (index from = 0; from == 0 || from < all; from += S * slice<T>) {
    const index length = all - from < slice<T> ? all - from : slice<T>;
    Vector<T> acc[R][S] = {};
    for (index begin = 0; begin < length; begin += L) {
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        const index k = from + s * slice<T> + begin, count = all - k < L ? all - k : L;
        if (count <= 0) break;
        const T* rows = w.data + k * per;
        prefetch_tile(next + k * per * L);
        Words<T> v[L];
        if (units >= L && (k + L) * per <= depth) {
#pragma GCC unroll 16
          for (int u = 0; u < L; ++u) v[u] = load_words(rows + u * w.row);
        } else {
          for (int u = 0; u < L; ++u)
            v[u] = u < units ? load_some_words(rows + u * w.row, depth - k * per) : Words<T>{};
        }
        transpose(v);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) {
          if (j >= count) break;
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            acc[r][s] = multiply_add<T>(repeat_word(a[r] + (k + j) * per), v[j], acc[r][s]);
        }
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      if (s > 0 && from + s * slice<T> >= all) break;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        store(c[r], load(from == 0 && s == 0 && init ? init : c[r]) + acc[r][s]);
    }
  }
}

// A packed or an unpacked tile, called with the arguments of tile().
template <class Cell, class T, int P>
struct Tile {
  TileFunction<T> packed;  // null: the tile is unpacked
  int rows;
  Matrix<const T> w;
  index hidden, depth, unit;
  int begin;  // the first gate of the window

  void operator()(const Operand<T>* const* a, const Operand<T>* b, Real<T>* const* c,
                  const Real<T>* init, const Extent& extent) const {
    if constexpr (on_matrix_unit<T>)
      packed(a, b, c, init, extent);
    else if (packed)
      packed(a, b, c, init, extent);
    else
      run(a, c, init, std::make_integer_sequence<int, unpacked_tile_rows>{});
  }

  template <int... R>
  void run(const T* const* a, Real<T>* const* c, const Real<T>* init,
           std::integer_sequence<int, R...>) const {
    ((rows == R + 1 ? run<R + 1>(a, c, init) : void()), ...);
  }

  // All gates of the window, one after the other.
  template <int R>
  void run(const T* const* a, Real<T>* const* c, const Real<T>* init) const {
    constexpr int L = lanes<T>, slices = R <= 2 ? 2 : 1;
    const Window window{begin, begin + P};
    Real<T>* gate[R];
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) gate[r] = c[r] + p * L;
      unpacked_gate<T, R, slices>(a, {unit_row<Cell>(w, hidden, begin + p, unit), w.row},
                                  next_rows<Cell>(w, hidden, window, begin + p, unit), depth,
                                  hidden - unit, gate, init ? init + p * L : nullptr);
    }
  }
};

}  // namespace rnnfast::RNNFAST_TARGET

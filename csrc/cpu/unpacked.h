// The product of gemm.h for a few rows and weights that are read only once, a single step's: each
// vector of weights is turned in registers and used at once, since to write it to a panel and read it
// again would cost more than the product. The sequence of operations of every element is that of
// tile().
#pragma once

#include "gemm.h"

namespace rnnfast::RNNFAST_TARGET {

inline constexpr index unpacked_tile_rows = 8;
inline constexpr index most_unpacked_rows = 16;  // of more it is faster to pack the weights once

// Gates [begin, begin + P) of one block of units; result in c[r], P vectors; init as in tile().
template <class Cell, class T, int R, int P>
void unpacked_gates(const T* const* a, Matrix<const T> w, index hidden, index depth, int begin,
                    index unit, index units, Real<T>* const* c, const Real<T>* init) {
  constexpr int L = lanes<T>;
  constexpr int per = per_word<T>;
  const index all = words<T>(depth);
  for (index from = 0; from == 0 || from < all; from += slice<T>) {
    const index to = from + slice<T> < all ? from + slice<T> : all;
    Vector<T> acc[R][P] = {};
    for (index k = from; k < to; k += L) {
      const index count = to - k < L ? to - k : L;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const T* rows = w.data + (Cell::weight_block[begin + p] * hidden + unit) * w.row + k * per;
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
            acc[r][p] = multiply_add<T>(repeat_word(a[r] + (k + j) * per), v[j], acc[r][p]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        store(c[r] + p * L, load(from == 0 && init ? init + p * L : c[r] + p * L) + acc[r][p]);
  }
}

// All gates of a window: together where a row or two alone have too few independent sums, one by one
// where more rows need the registers.
template <class Cell, class T, int P, int R>
void unpacked_tile(const T* const* a, Matrix<const T> w, index hidden, index depth, int begin,
                   index unit, index units, Real<T>* const* c, const Real<T>* init) {
  if constexpr (R <= 2) {
    unpacked_gates<Cell, T, R, P>(a, w, hidden, depth, begin, unit, units, c, init);
  } else {
    Real<T>* gate[R];
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) gate[r] = c[r] + p * lanes<T>;
      unpacked_gates<Cell, T, R, 1>(a, w, hidden, depth, begin + p, unit, units, gate,
                                    init ? init + p * lanes<T> : nullptr);
    }
  }
}

// Either kind of tile, with the arguments of tile().
template <class Cell, class T, int P>
struct Tile {
  TileFunction<T> packed;  // null: the other
  int rows;
  Matrix<const T> w;
  index hidden, depth, unit;
  int begin;  // of the window

  void operator()(const T* const* a, const T* b, Real<T>* const* c, const Real<T>* init,
                  const Extent& extent) const {
    if (packed)
      packed(a, b, c, init, extent);
    else
      run(a, c, init, std::make_integer_sequence<int, unpacked_tile_rows>{});
  }

  template <int... R>
  void run(const T* const* a, Real<T>* const* c, const Real<T>* init,
           std::integer_sequence<int, R...>) const {
    ((rows == R + 1
          ? unpacked_tile<Cell, T, P, R + 1>(a, w, hidden, depth, begin, unit, hidden - unit, c, init)
          : void()),
     ...);
  }
};

}  // namespace rnnfast::RNNFAST_TARGET

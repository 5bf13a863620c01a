// The one building block: rows times a packed panel, c[r] += sum over k of a[r][k] * b[k], and the
// packing. The input projection, the recurrence, the backward recurrence, input gradients and weight
// gradients are all this product (Georganas et al., arXiv 1906.06440).
//
// A panel holds P vectors for every k: [k][P][lanes]. Consecutive panels are consecutive blocks of
// output columns. For a layer's forward weights the P vectors of a block are the gates of `lanes`
// hidden units, so that a tile of c holds all gates of its units.
//
// For bfloat16 k counts words of two neighbours, in rows and in panels ([k][P][lanes][2]); the result
// and its initial value are float32. Panels for a matrix unit are [P][k][lanes][2]. All strides are in
// numbers.
#pragma once

#include "cpu/kernels/matrix_unit.h"
#include "cpu/kernels/vector_pair.h"

#include "cells/math.h"  // needs the number types above
#include "cells/cells.h"

namespace rnnfast::RNNFAST_TARGET {

// Multiplies R rows (addresses in a) by N panels of P vectors, which begin at b. The result of row r in
// panel n is at c[r] + n * c_panel. It starts from `init` (N panels, init_panel apart), or from c where
// `init` is null. Every element is the same sequence of fused multiply-adds in the order of k, for all
// R and N.
//
// Tried: software prefetch 2 KiB ahead in the tile of one row is 0 to 4 percent slower.
// Tried: tiles of 7 to 12 rows by two vectors read the panels once; the time changes by at most 3
// percent, up or down (Zen 4, B=8, H=128 to 512).
template <class T, int R, int N, int P>
void tile(const T* const* a, const T* b, Real<T>* const* c, const Real<T>* init, const Extent& extent) {
  using V = Vector<T>;
  constexpr int L = lanes<T>;
  const T* row[R];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) row[r] = a[r];
  const Depth depth = extent.depth;
  const index b_panel = extent.panel, step = extent.step, c_panel = extent.c_panel;
  // Slices run along the inner index where there is one outer step, otherwise over whole outer steps.
  const bool along_inner = depth.outer == 1;
  const index length = along_inner ? depth.inner : depth.outer;
  index part = along_inner ? slice<T> : slice<T> / (depth.inner + 1) + 1;
  if (part > length) part = length;
  index begin = 0;
  do {
    const index end = begin + part < length ? begin + part : length;
    V acc[R][N][P];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) acc[r][n][p] = V{};
    const index outer_end = along_inner ? 1 : end, inner_begin = along_inner ? begin : 0;
    const index inner_end = along_inner ? end : depth.inner;
    for (index outer = along_inner ? 0 : begin; outer < outer_end; ++outer) {
      index offset = outer * depth.outer_stride + inner_begin * depth.inner_stride;
      for (index inner = inner_begin; inner < inner_end; ++inner) {
        Words<T> w[N][P];
#pragma GCC unroll 32
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 32
          for (int p = 0; p < P; ++p) w[n][p] = load_words(b + n * b_panel + p * L * per_word<T>);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
          const Words<T> x = repeat_word(row[r] + offset);
#pragma GCC unroll 32
          for (int n = 0; n < N; ++n)
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p) acc[r][n][p] = multiply_add<T>(x, w[n][p], acc[r][n][p]);
        }
        offset += depth.inner_stride;
        b += step;
      }
    }
    const bool from_init = init && begin == 0;
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const Real<T>* from = from_init ? init : c[r];
      const index from_panel = from_init ? extent.init_panel : c_panel;
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p)
          store(c[r] + n * c_panel + p * L, load(from + n * from_panel + p * L) + acc[r][n][p]);
    }
    begin = end;
  } while (begin < length);
}

template <class T>
using VectorTile = void (*)(const T* const*, const T*, Real<T>* const*, const Real<T>*, const Extent&);
template <class T>
using TileFunction = std::conditional_t<on_matrix_unit<T>, MatrixTile<matrix_parts<T>>, VectorTile<T>>;

// Panels of a tile: wide tiles need fewer loads for their arithmetic, and give a few rows enough
// independent accumulators.
template <int P>
inline constexpr int most_panels = P == 1 ? 4 : 2;
template <class T, int P, int N>
inline constexpr int most_rows = on_matrix_unit<T> ? MatrixTile<1>::most_rows
                                 : P == 1          ? accumulators / 4
                                                   : accumulators / (N * P);

// The most rows of any tile, and the most vectors of its result.
template <class T>
inline constexpr int tile_rows = on_matrix_unit<T> ? MatrixTile<1>::most_rows : accumulators;
template <class T>
inline constexpr int tile_vectors = on_matrix_unit<T> ? 4 * MatrixTile<1>::most_rows : accumulators;

template <class T, int P, int N, int... R>
TileFunction<T> tile_of(int rows, std::integer_sequence<int, R...>) {
  if constexpr (on_matrix_unit<T>) {
    return {rows, N, P};
  } else {
    static constexpr TileFunction<T> table[] = {&tile<T, R + 1, N, P>...};
    return table[rows - 1];
  }
}

// Calls f(first row, rows, first panel, panels, tile function) for tiles that cover `rows` rows and the
// panels in `panels`. All tiles of a group of panels come before the next group, and share the rows
// evenly. Steps that read the same panels alternate `descending`, so that the panels read last are
// still cached where the cache cannot hold all panels.
template <class T, int P, class F>
RNNFAST_INLINE void for_each_tile(index rows, Range panels, bool descending, F f) {
  if (rows <= 0) return;
  while (panels.size() > 0) {
    const index left = panels.size();
    auto group = [&]<int N>(std::integral_constant<int, N>) {
      constexpr int most = most_rows<T, P, N>;
      const index tiles = (rows + most - 1) / most;
      const index panel = descending ? panels.end - N : panels.begin;
      for (index i = 0; i < tiles; ++i) {
        // A matrix unit takes as long for fewer rows.
        const auto first = [&](index tile) {
          return on_matrix_unit<T> ? tile * most : rows * tile / tiles;
        };
        const index begin = first(i), end = i + 1 < tiles ? first(i + 1) : rows;
        const int count = static_cast<int>(end - begin);
        f(begin, count, panel, N, tile_of<T, P, N>(count, std::make_integer_sequence<int, most>{}));
      }
      if (descending)
        panels.end -= N;
      else
        panels.begin += N;
    };
    if constexpr (P == 1) {
      if (left >= 4)
        group(std::integral_constant<int, 4>{});
      else if (left >= 2)
        group(std::integral_constant<int, 2>{});
      else
        group(std::integral_constant<int, 1>{});
    } else {
      // With enough rows one panel fills the registers; a tile of two panels would have fewer rows.
      if (left >= 2 && (P == 2 || rows <= most_rows<T, P, 2>))
        group(std::integral_constant<int, 2>{});
      else
        group(std::integral_constant<int, 1>{});
    }
  }
}

// Stands for a cell in the packing of a matrix without gates.
struct Plain {
  static constexpr int weight_block[] = {0};
  static constexpr Window window{0, 1};
};

// --- packing ---------------------------------------------------------------------------------------

// The row of weights of a gate and a unit, in a matrix that has `hidden` rows for each gate block.
template <class Cell, class T>
T* unit_row(Matrix<T> w, index hidden, int slot, index unit) {
  return w.data + (Cell::weight_block[slot] * hidden + unit) * w.row;
}

// The rows that are read after one gate of a block of units: those of the next gate or the next block.
template <class Cell, class T>
const T* next_rows(Matrix<const T> w, index hidden, Window window, int slot, index unit) {
  return slot + 1 < window.end ? unit_row<Cell>(w, hidden, slot + 1, unit)
                               : unit_row<Cell>(w, hidden, window.begin, unit + lanes<T>);
}

// Prefetches as many numbers as one iteration of pack_forward reads, in the order of memory. All
// iterations of a gate together prefetch the rows that are read next, which the processor cannot
// predict.
template <class T>
RNNFAST_INLINE void prefetch_tile(const T* p) {
  constexpr index line = 64 / sizeof(T);
#pragma GCC unroll 16
  for (index k = 0; k < lanes<T> * lanes<T> * per_word<T>; k += line) prefetch(p + k);
}

// Packs one panel of a layer's forward weights: the gates in `window` of `units` units that begin at
// `unit`, for all k < depth. The panel is zero past the units and past the depth.
template <class Cell, class T>
void pack_forward(T* to, Matrix<const T> w, index hidden, index depth, Window window, index unit,
                  index units) {
  constexpr int L = lanes<T>, per = per_word<T>;
  const PanelShape<T> shape(window.width(), depth);
  const index step = shape.step;
  for (int slot = window.begin; slot < window.end; ++slot, to += shape.gate) {
    const T* const from = unit_row<Cell>(w, hidden, slot, unit);
    const T* const next = next_rows<Cell>(w, hidden, window, slot, unit);
    index k = 0;
    for (; k + L * per <= depth; k += L * per) {
      prefetch_tile(next + k * L);
      Words<T> v[L];
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u) v[u] = u < units ? load_words(from + u * w.row + k) : Words<T>{};
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store_words(to + (k / per + j) * step, v[j]);
    }
    for (; k < padded_words<T>(depth) * per; ++k)
      for (int u = 0; u < L; ++u)
        to[k / per * step + u * per + k % per] = u < units && k < depth ? from[u * w.row + k] : T{};
  }
}

// The same for a matrix unit, of numbers in parts.
template <class Cell, int parts>
void pack_forward(Bfloat16* to, Matrix<const InParts<parts>> w, index hidden, index depth,
                  Window window, index unit, index units) {
  using T = InParts<parts>;
  constexpr int L = lanes<T>;
  const PanelShape<T> shape(window.width(), depth);
  for (int slot = window.begin; slot < window.end; ++slot, to += shape.gate) {
    const T* const from = unit_row<Cell>(w, hidden, slot, unit);
    const T* const next = next_rows<Cell>(w, hidden, window, slot, unit);
    for (index k = 0; k < padded_words<T>(depth) * 2; k += L) {
      Vector<T> v[L] = {};
      if (k + L <= depth) prefetch_tile(next + k);
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u)
        if (u < units && k < depth) v[u] = load_some(from + u * w.row + k, depth - k);
      transpose(v);
      for (int j = 0; j < L; j += 2) store_panel_word<T>(to, shape.step, (k + j) / 2, v[j], v[j + 1]);
    }
  }
}

// The inverse of pack_forward, for gradients: from a panel [k][gates][lanes] to torch's layout.
template <class Cell, class T>
void unpack_forward(Matrix<T> w, const Real<T>* from, index hidden, index depth, Window window,
                    index unit, index units) {
  constexpr int L = lanes<T>;
  const index step = window.width() * L;
  for (int slot = window.begin; slot < window.end; ++slot, from += L) {
    T* to = unit_row<Cell>(w, hidden, slot, unit);
    index k = 0;
    for (; k + L <= depth; k += L) {
      Vector<T> v[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) v[j] = load(from + (k + j) * step);
      transpose(v);
      for (index u = 0; u < units; ++u) store(to + u * w.row + k, v[u]);
    }
    for (; k < depth; ++k)
      for (index u = 0; u < units; ++u) to[u * w.row + k] = narrow<T>(from[k * step + u]);
  }
}

// Packs one panel of `columns` columns that begin at `column`, for products with the gradients of the
// gates: k runs over (block of units, slot of the window, lane), the order in which these gradients are
// stored. Lanes past the matrix are zero.
template <class Cell, class T>
void pack_backward(Operand<T>* to, Matrix<const T> w, index hidden, Window window, index column,
                   index columns) {
  constexpr int L = lanes<T>, per = per_word<T>;
  index word = 0;
  for (index unit = 0; unit < hidden; unit += L)
    for (int slot = window.begin; slot < window.end; ++slot)
      for (index u = unit; u < unit + L; u += per, ++word) {
        const auto row = [&](index n) {
          const T* from = unit_row<Cell>(w, hidden, slot, n) + column;
          prefetch(from + L * w.row);  // one line of every row, which processors cannot predict
          return n < hidden ? load_some(from, columns) : Vector<T>{};
        };
        if constexpr (per == 2)
          store_panel_word<T>(to, L * per, word, row(u), row(u + 1));
        else
          store(to + word * L, row(u));
      }
  if constexpr (per == 2)
    for (const index end = padded_words<T>(word * per); word < end; ++word)
      store_panel_word<T>(to, L * per, word, Vector<T>{}, Vector<T>{});
}

// Copies pairs of rows, of `numbers` numbers each, so that a word has one number of both rows: word k
// of pair p, at to[(p * numbers + k) * 2], is number k of the rows 2 p and 2 p + 1. Rows past `rows`
// are zero. row(r) is the address of row r. Of a number in parts there are such words of every part,
// part by part for each group of pairs.
template <class T, class Row>
void pair_rows(Bfloat16* to, index numbers, Range pairs, index rows, Row row) {
  constexpr int L = lanes<T>;
  for (index p = pairs.begin; p < pairs.end; ++p) {
    const T* a = 2 * p < rows ? row(2 * p) : nullptr;
    const T* b = 2 * p + 1 < rows ? row(2 * p + 1) : nullptr;
    if constexpr (parts_of<T> > 0) {  // gradients of gates: whole vectors
      for (index k = 0; k < numbers; k += L)
        store_panel_word<T>(to + k * 2, numbers * 2, p, a ? load(a + k) : Vector<T>{},
                            b ? load(b + k) : Vector<T>{});
      continue;
    } else {
      Bfloat16* out = to + p * numbers * 2;
      index k = 0;
      for (; k + L <= numbers; k += L) {
        Halves low{}, high{};
        if (a) __builtin_memcpy(&low, a + k, sizeof low);
        if (b) __builtin_memcpy(&high, b + k, sizeof high);
        store_words(out + k * 2, pair(low, high));
      }
      // Fewer than L numbers are left. Without the bound `left` GCC warns, for aarch64, of 2^63
      // iterations.
      for (int left = L; k < numbers && left > 0; ++k, --left) {
        out[k * 2] = a ? a[k] : Bfloat16{};
        out[k * 2 + 1] = b ? b[k] : Bfloat16{};
      }
    }
  }
}

// Copies rows so that the numbers of a column follow one another, as a row of padded_width: number r of
// column k is number k of row r. `groups` are those of matrix_depth rows; rows past `rows` are zero.
template <class T, class Row>
void turn_rows(Bfloat16* to, index width, index numbers, Range groups, index rows, Row row) {
  constexpr int L = lanes<T>, parts = matrix_parts<T>;
  for (index first = groups.begin * matrix_depth; first < groups.end * matrix_depth; first += 2 * L)
    for (index column = 0; column < numbers; column += L) {
      const index count = numbers - column < L ? numbers - column : L;
      Vector<int> v[parts][L];
      for (int j = 0; j < L; ++j) {
        Halves part[2][parts] = {};
        for (int n = 0; n < 2; ++n) {
          const index r = first + 2 * j + n;
          if (r >= rows) continue;
          if constexpr (parts_of<T> > 0)
            split<parts>(load_some(row(r) + column, count), part[n]);
          else
            __builtin_memcpy(part[n], row(r) + column, static_cast<std::size_t>(count) * sizeof(T));
        }
        for (int p = 0; p < parts; ++p) v[p][j] = pair(part[0][p], part[1][p]);
      }
      Bfloat16* const group = to + first / matrix_depth * parts * matrix_depth + first % matrix_depth;
      for (int p = 0; p < parts; ++p) {
        transpose(v[p]);
        for (index k = 0; k < count; ++k)
          store_words(group + (column + k) * width + p * matrix_depth, v[p][k]);
      }
    }
}

}  // namespace rnnfast::RNNFAST_TARGET

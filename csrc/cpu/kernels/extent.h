// What a product reads: how far apart its numbers lie, and rows in the form in which a tile reads them.
#pragma once

#include "cpu/kernels/parallel.h"
#include "cpu/kernels/vec.h"

namespace rnnfast::RNNFAST_TARGET {

// How many accumulators fit the registers beside the operands.
#if RNNFAST_VECTOR_REGISTERS >= 32
inline constexpr int accumulators = 24;
#else
inline constexpr int accumulators = 12;
#endif

// The matrix unit of a processor multiplies 16 rows by 16 units over 32 numbers of the sum at once, in
// bfloat16. RNNFAST_MATRIX_UNIT comes from the build: `AMX`, the processor's, or `EMULATED`, vector
// code with the very sums of AMX, for tests on any machine.
enum class Unit { NONE, AMX, EMULATED };
#if defined(RNNFAST_MATRIX_UNIT)
inline constexpr Unit matrix_unit = Unit::RNNFAST_MATRIX_UNIT;
#else
inline constexpr Unit matrix_unit = Unit::NONE;
#endif

// Whether products of this type run on the matrix unit. All of them do, whatever their size, so that
// sums depend on neither the batch nor the number of steps.
template <class T>
inline constexpr bool on_matrix_unit = is_bfloat16<T> && matrix_unit != Unit::NONE;

inline constexpr int matrix_rows = 16;
inline constexpr int matrix_units = lanes<Bfloat16>;  // AMX: 16
inline constexpr int matrix_depth = 32;               // numbers of the sum
inline constexpr int matrix_words = matrix_depth / per_word<Bfloat16>;

// The index k of the sum runs over outer * inner words of a row, which are outer_stride and
// inner_stride apart.
struct Depth {
  index outer, outer_stride, inner, inner_stride;
};

// The words of a sum of n numbers. For a matrix unit they are whole groups, the last padded with zeros.
template <class T>
constexpr index padded_words(index n) {
  return on_matrix_unit<T> ? (n + matrix_depth - 1) / matrix_depth * matrix_words : words<T>(n);
}

template <class T>
constexpr Depth contiguous(index n) {
  if constexpr (on_matrix_unit<T>)
    return {padded_words<T>(n) / matrix_words, matrix_depth, matrix_words, per_word<T>};
  else
    return {1, 0, words<T>(n), per_word<T>};
}

template <class T>
struct Panels {
  const T* data;
  index panel;  // the distance from one panel to the next
  index step;   // the distance from one k to the next: P vectors, more in a part of a wider panel
};

// Where the words of a panel of `gates` gates lie.
template <class T>
struct PanelShape {
  index step, gate, size;  // the distance from one k to the next, and from one gate to the next

  constexpr PanelShape(index gates, index depth)
      : step(lanes<T> * per_word<T> * (on_matrix_unit<T> ? 1 : gates)),
        gate(lanes<T> * per_word<T> * (on_matrix_unit<T> ? padded_words<T>(depth) : 1)),
        size(lanes<T> * per_word<T> * gates * padded_words<T>(depth)) {}
};

// What all tiles of a product have in common. Tiles take it by reference: to copy it to the stack of
// every call cost a stalled load, 2 percent of a training step.
struct Extent {
  Depth depth;
  index panel, step;          // as in Panels
  index c_panel, init_panel;  // the distance from one panel to the next in c and in init
  index gate = 0;             // for a matrix unit: as in PanelShape
};

// The length of a slice: a sum adds up slices that start from zero, and then the slices. Rounding
// errors grow with the square root of the longest chain of additions, and one chain of 1024 is less
// exact than BLAS libraries. Slices of bfloat16 are longer, since the rounding of its numbers outweighs
// that of the chain.
template <class T>
inline constexpr index slice = is_bfloat16<T> ? 256
                               : fused        ? 64
                                              : 32;

// --- rows that are copied before a product reads them ------------------------------------------------
//
// A word must not reach past a row, so rows of an odd number of bfloat16 are copied and padded with a
// zero. A matrix unit reads 16 rows that lie at equal distances, padded to whole groups with zeros.

// The distance from one such row to the next. Rows for a matrix unit begin in different sets of the
// cache: an odd number of lines.
template <class T>
constexpr index padded_width(index width) {
  const index numbers = padded_words<T>(width) * per_word<T>;
  return on_matrix_unit<T> ? (numbers / matrix_depth | 1) * matrix_depth : numbers;
}
template <class T>
constexpr bool needs_padding(index width) {
  return on_matrix_unit<T> || padded_width<T>(width) != width;
}
// Rows of memory for n such rows: a matrix unit reads whole tiles, and ignores what follows the last
// row.
template <class T>
constexpr index padded_rows(index n) {
  return on_matrix_unit<T> && n > 0 ? n + matrix_rows - 1 : n;
}
template <class T>
void pad_row(T* to, const T* from, index width) {
  __builtin_memcpy(to, from, static_cast<std::size_t>(width) * sizeof(T));
  for (index k = width; k < padded_words<T>(width) * per_word<T>; ++k) to[k] = T{};
}

}  // namespace rnnfast::RNNFAST_TARGET

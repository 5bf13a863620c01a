// What a product reads: how far apart its numbers lie, and rows in the form in which a tile reads them.
#pragma once

#include <type_traits>

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

// How many bfloat16 numbers a product on the matrix unit reads for a number of this type; 0: products
// run on vectors. All products of a type run on the same unit, whatever their size, so that sums depend
// on neither the batch nor the number of steps.
template <class T>
inline constexpr int matrix_parts = matrix_unit == Unit::NONE ? 0
                                    : is_bfloat16<T>          ? 1
                                                              : parts_of<T>;
template <class T>
inline constexpr bool on_matrix_unit = matrix_parts<T> > 0;

// What a product reads.
template <class T>
using Operand = std::conditional_t<on_matrix_unit<T>, Bfloat16, T>;

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
// Where numbers are in parts, a row and a panel have the words of all parts of a group, part by part.
template <class T>
constexpr index padded_words(index n) {
  return on_matrix_unit<T> ? (n + matrix_depth - 1) / matrix_depth * matrix_words : words<T>(n);
}

template <class T>
constexpr Depth contiguous(index n) {
  if constexpr (on_matrix_unit<T>)
    return {padded_words<T>(n) / matrix_words, matrix_depth * matrix_parts<T>, matrix_words,
            per_word<T>};
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
  index step;  // the distance from one k to the next
  index gate;  // the distance from one gate to the next
  index size;  // of a panel

  constexpr PanelShape(index gates, index depth)
      : step(lanes<T> * per_word<T> * (on_matrix_unit<T> ? 1 : gates)),
        gate(lanes<T> * per_word<T> *
             (on_matrix_unit<T> ? matrix_parts<T> * padded_words<T>(depth) : 1)),
        size(gates * (on_matrix_unit<T> ? gate : lanes<T> * per_word<T> * padded_words<T>(depth))) {}
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
  return on_matrix_unit<T> ? (numbers / matrix_depth * matrix_parts<T> | 1) * matrix_depth : numbers;
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

// Rounds v to a sum of `parts` bfloat16 numbers, the largest first: three of them are v exactly. A
// number that rounds to infinity is cut off instead. The other parts of an infinity and a NaN are zero.
template <int parts>
RNNFAST_INLINE void split(Vector<float> v, Halves* part) {
  using Bits = Vector<std::uint32_t>;
#pragma GCC unroll 3
  for (int p = 0; p < parts; ++p) {
    const Bits bits = bit_cast<Bits>(v), cut = bits & 0xffff0000u;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    const auto is_special = (bits & 0x7f800000u) == 0x7f800000u;
    const auto overflows = (rounded & 0x7f800000u) == 0x7f800000u;
    const Bits special = cut | (v == v ? Bits{} : Bits{} + 0x400000u);
    const Bits high = is_special ? special : overflows ? cut : rounded;
    part[p] = __builtin_convertvector(high >> 16, Halves);
    v = is_special ? Vector<float>{} : v - bit_cast<Vector<float>>(high);
  }
}

// Stores numbers k to k + lanes of a row.
template <class T>
RNNFAST_INLINE void store_operand(Operand<T>* row, index k, Vector<T> v) {
  if constexpr (parts_of<T> == 0) {
    store(row + k, v);
  } else {
    Halves part[parts_of<T>];
    split<parts_of<T>>(v, part);
    row += k / matrix_depth * parts_of<T> * matrix_depth + k % matrix_depth;
    for (int p = 0; p < parts_of<T>; ++p)
      __builtin_memcpy(row + p * matrix_depth, &part[p], sizeof part[p]);
  }
}

// Stores a word of every unit of a panel: two neighbours along the sum.
template <class T>
RNNFAST_INLINE void store_panel_word(Bfloat16* panel, index step, index word, Vector<T> low,
                                     Vector<T> high) {
  constexpr int parts = parts_of<T> == 0 ? 1 : parts_of<T>;
  Halves a[parts], b[parts];
  if constexpr (is_bfloat16<T>) {
    a[0] = narrow(low), b[0] = narrow(high);
  } else {
    split<parts>(low, a), split<parts>(high, b);
  }
  panel += (word / matrix_words * parts * matrix_words + word % matrix_words) * step;
  for (int p = 0; p < parts; ++p) store_words(panel + p * matrix_words * step, pair(a[p], b[p]));
}

// Copies a row, and pads it with zeros.
template <class T>
void pad_row(Operand<T>* to, const T* from, index width) {
  const index padded = padded_words<T>(width) * per_word<T>;
  if constexpr (parts_of<T> == 0) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(width) * sizeof(T));
    for (index k = width; k < padded; ++k) to[k] = T{};
  } else {
    for (index k = 0; k < padded; k += lanes<T>)
      store_operand<T>(to, k, k < width ? load_some(from + k, width - k) : Vector<T>{});
  }
}

}  // namespace rnnfast::RNNFAST_TARGET

// Tiles of the matrix unit of a processor, AMX, and of its emulation.
#pragma once

#include "cpu/kernels/extent.h"

namespace rnnfast::RNNFAST_TARGET {

// What a few tiles multiply: one or two tiles of rows, by one or two of panels.
struct MatrixFactors {
  const Bfloat16 *a[2], *b[2];
  index row;     // from one row of a to the next, in numbers; a row's numbers follow one another
  index word;    // from one word of b to the next, in numbers
  index groups;  // of matrix_depth numbers of the sum
};

// Makes the unit usable while it lives, where it is `used`.
template <bool used>
class MatrixUnit {
 public:
  MatrixUnit() {}
};

#if defined(__AMX_BF16__)
// Configures the unit's eight tiles in full size. Other libraries configure them otherwise between
// calls.
template <>
class MatrixUnit<true> {
 public:
  MatrixUnit() {
    Config config;
    __asm__ volatile("" ::: "memory");  // _tile_loadconfig names too little of what it reads
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;

 private:
  struct Config {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};

// sums[row tile][panel tile][row][unit]. All 16 rows of a tile are read: memory must follow the last
// row, with any contents. The instructions take the numbers of tiles as literals: 0 to 3 are sums, 4
// and 5 rows, 6 and 7 panels.
template <int rows, int panels>
RNNFAST_INLINE void multiply_tiles(const MatrixFactors& of, int, float* sums) {
  __asm__ volatile("" ::: "memory");  // _tile_loadd names too little of what it reads
  const index row_bytes = of.row * 2, word_bytes = of.word * 2;
  const Bfloat16 *a0 = of.a[0], *a1 = of.a[1], *b0 = of.b[0], *b1 = of.b[1];
  _tile_zero(0);
  if constexpr (panels > 1) _tile_zero(1);
  if constexpr (rows > 1) _tile_zero(2);
  if constexpr (rows > 1 && panels > 1) _tile_zero(3);
  for (index group = 0; group < of.groups; ++group) {
    _tile_loadd(6, b0, word_bytes);
    _tile_loadd(4, a0, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (panels > 1) {
      _tile_loadd(7, b1, word_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(5, a1, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (panels > 1) _tile_dpbf16ps(3, 5, 7);
    }
    a0 += matrix_depth;
    b0 += matrix_words * of.word;
    if constexpr (rows > 1) a1 += matrix_depth;
    if constexpr (panels > 1) b1 += matrix_words * of.word;
  }
  constexpr int size = matrix_rows * matrix_units;
  _tile_stored(0, sums, matrix_units * 4);
  if constexpr (panels > 1) _tile_stored(1, sums + size, matrix_units * 4);
  if constexpr (rows > 1) _tile_stored(2, sums + panels * size, matrix_units * 4);
  if constexpr (rows > 1 && panels > 1) _tile_stored(3, sums + 3 * size, matrix_units * 4);
}
#else
// The sums of TDPBF16PS: those of even and of odd numbers of the sum run apart, each from zero, and
// are then added to each other and to the sum so far. Compared on an Intel processor: all of five
// million sums had the same bits. Only `count` rows are read.
template <int rows, int panels>
RNNFAST_INLINE void multiply_tiles(const MatrixFactors& of, int count, float* sums) {
  const auto even = [](Vector<int> v) { return bit_cast<Vector<float> >(v << 16); };
  const auto odd = [](Vector<int> v) { return bit_cast<Vector<float> >(v & ~0xffff); };
  for (int r = 0; r < count; ++r)
    for (int panel = 0; panel < panels; ++panel) {
      const Bfloat16* a = of.a[r / matrix_rows] + r % matrix_rows * of.row;
      const Bfloat16* b = of.b[panel];
      Vector<float> sum{};
      for (index group = 0; group < of.groups; ++group) {
        Vector<float> of_even{}, of_odd{};
        for (int k = 0; k < matrix_words; ++k, a += 2, b += of.word) {
          const Vector<int> x = repeat_word(a), y = load_words(b);
          of_even = fma(even(x), even(y), of_even);
          of_odd = fma(odd(x), odd(y), of_odd);
        }
        sum += of_even + of_odd;
      }
      const int tile = r / matrix_rows * panels + panel;
      store(sums + (tile * matrix_rows + r % matrix_rows) * matrix_units, sum);
    }
}
#endif

// As tile() of product.h: multiplies `rows` rows by `panels` panels of `gates` gates. The rows are
// padded (extent.h), and lie at equal distances.
struct MatrixTile {
  static constexpr int most_rows = 2 * matrix_rows;

  int rows, panels, gates;

  void operator()(const Bfloat16* const* a, const Bfloat16* b, float* const* c, const float* init,
                  const Extent& extent) const {
    constexpr index part = slice<Bfloat16> / matrix_words;
    const index groups = extent.depth.outer;
    index begin = 0;
    do {
      const index end = begin + part < groups ? begin + part : groups;
      const float* from = begin == 0 ? init : nullptr;
      for (int column = 0; column < panels * gates; column += 2) {
        MatrixFactors factors{{}, {}, rows > 1 ? a[1] - a[0] : 0, extent.step, end - begin};
        for (int i = 0; i * matrix_rows < rows; ++i)
          factors.a[i] = a[i * matrix_rows] + begin * matrix_depth;
        const int columns = panels * gates - column > 1 ? 2 : 1;
        for (int j = 0; j < columns; ++j)
          factors.b[j] = b + (column + j) / gates * extent.panel + (column + j) % gates * extent.gate +
                         begin * matrix_words * extent.step;
        alignas(64) float sums[4 * matrix_rows * matrix_units];
        multiply(factors, columns, sums);
        for (int j = 0; j < columns; ++j) add(sums, columns, column, j, c, from, extent);
      }
      begin = end;
    } while (begin < groups);
  }

 private:
  void multiply(const MatrixFactors& factors, int columns, float* sums) const {
    const bool two_rows = rows > matrix_rows;
    if (columns == 2)
      two_rows ? multiply_tiles<2, 2>(factors, rows, sums) : multiply_tiles<1, 2>(factors, rows, sums);
    else
      two_rows ? multiply_tiles<2, 1>(factors, rows, sums) : multiply_tiles<1, 1>(factors, rows, sums);
  }

  // Adds the sums of column tile j to the result.
  void add(const float* sums, int columns, int column, int j, float* const* c, const float* init,
           const Extent& extent) const {
    const int panel = (column + j) / gates, gate = (column + j) % gates;
    for (int r = 0; r < rows; ++r) {
      const int tile = r / matrix_rows * columns + j;
      float* to = c[r] + panel * extent.c_panel + gate * matrix_units;
      const float* from = init ? init + panel * extent.init_panel + gate * matrix_units : to;
      store(to, load(from) + load(sums + (tile * matrix_rows + r % matrix_rows) * matrix_units));
    }
  }
};

}  // namespace rnnfast::RNNFAST_TARGET

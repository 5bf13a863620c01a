// Tiles of the matrix unit of a processor, AMX, and of its emulation.
#pragma once

#include "cpu/kernels/extent.h"

namespace rnnfast::RNNFAST_TARGET {

// The factors of a few tiles: one or two tiles of rows, a, and one or two tiles of panels, b. The
// numbers of a row follow one another. Distances are in numbers.
struct MatrixFactors {
  const Bfloat16 *a[2], *b[2];
  index row;     // the distance from one row of a to the next
  index word;    // the distance from one word of b to the next
  index groups;  // how many groups of matrix_depth numbers a sum has
};

// The sums of the unit in vector code.
struct EmulatedTiles {
  // Adds a group to the sums of one row and all units, as the instruction TDPBF16PS does. The products
  // at even k and those at odd k have sums of their own, which start from zero. Both are then added to
  // each other, and to the sum so far. On an Intel processor five million sums had the same bits.
  RNNFAST_INLINE static Vector<float> multiply_group(const Bfloat16* a, const Bfloat16* b, index word,
                                                     Vector<float> sum) {
    const auto even = [](Vector<int> v) { return bit_cast<Vector<float>>(v << 16); };
    const auto odd = [](Vector<int> v) { return bit_cast<Vector<float>>(v & ~0xffff); };
    Vector<float> even_sum{}, odd_sum{};
    for (int k = 0; k < matrix_words; ++k, a += 2, b += word) {
      const Vector<int> x = repeat_word(a), y = load_words(b);
      even_sum = fma(even(x), even(y), even_sum);
      odd_sum = fma(odd(x), odd(y), odd_sum);
    }
    return sum + (even_sum + odd_sum);
  }

  // As AmxTiles::multiply_tiles. It reads only `count` rows.
  template <int rows, int panels>
  RNNFAST_INLINE static void multiply_tiles(const MatrixFactors& factors, int count, float* sums) {
    for (int r = 0; r < count; ++r)
      for (int panel = 0; panel < panels; ++panel) {
        const Bfloat16* a = factors.a[r / matrix_rows] + r % matrix_rows * factors.row;
        const Bfloat16* b = factors.b[panel];
        Vector<float> sum{};
        for (index group = 0; group < factors.groups;
             ++group, a += matrix_depth, b += matrix_words * factors.word)
          sum = multiply_group(a, b, factors.word, sum);
        const int tile = r / matrix_rows * panels + panel;
        store(sums + (tile * matrix_rows + r % matrix_rows) * matrix_units, sum);
      }
  }

  template <int rows, int parts>
  RNNFAST_INLINE static void multiply_parts(const MatrixFactors& factors, int count, float* sums) {
    constexpr int others[][2] = {{0, 1}, {0, 2}, {1, 1}, {1, 0}, {2, 0}};  // parts of a and b
    const index part = matrix_words * factors.word;
    for (int r = 0; r < count; ++r) {
      const Bfloat16 *a = factors.a[r / matrix_rows] + r % matrix_rows * factors.row, *b = factors.b[0];
      Vector<float> first{}, other{};
      for (index group = 0; group < factors.groups;
           ++group, a += parts * matrix_depth, b += parts * part) {
        first = multiply_group(a, b, factors.word, first);
        for (const auto& [i, j] : others)
          if (i + j < parts)
            other = multiply_group(a + i * matrix_depth, b + j * part, factors.word, other);
      }
      float* const to = sums + (r / matrix_rows * 2 * matrix_rows + r % matrix_rows) * matrix_units;
      store(to, first);
      store(to + matrix_rows * matrix_units, other);
    }
  }
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

struct AmxTiles {
  // sums[row tile][panel tile][row][unit]. All 16 rows of a tile are read, so memory with any contents
  // must follow the last row. The instructions take the numbers of tiles as literals: tiles 0 to 3 are
  // sums, 4 and 5 are rows, 6 and 7 are panels.
  template <int rows, int panels>
  RNNFAST_INLINE static void multiply_tiles(const MatrixFactors& factors, int, float* sums) {
    __asm__ volatile("" ::: "memory");  // _tile_loadd names too little of what it reads
    const index row_bytes = factors.row * 2, word_bytes = factors.word * 2;
    const Bfloat16 *a0 = factors.a[0], *a1 = factors.a[1], *b0 = factors.b[0], *b1 = factors.b[1];
    _tile_zero(0);
    if constexpr (panels > 1) _tile_zero(1);
    if constexpr (rows > 1) _tile_zero(2);
    if constexpr (rows > 1 && panels > 1) _tile_zero(3);
    for (index group = 0; group < factors.groups; ++group) {
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
      b0 += matrix_words * factors.word;
      if constexpr (rows > 1) a1 += matrix_depth;
      if constexpr (panels > 1) b1 += matrix_words * factors.word;
    }
    constexpr int size = matrix_rows * matrix_units;
    _tile_stored(0, sums, matrix_units * 4);
    if constexpr (panels > 1) _tile_stored(1, sums + size, matrix_units * 4);
    if constexpr (rows > 1) _tile_stored(2, sums + panels * size, matrix_units * 4);
    if constexpr (rows > 1 && panels > 1) _tile_stored(3, sums + 3 * size, matrix_units * 4);
  }

  // sums[row tile][first parts or others][row][unit], of one panel. The numbers of rows and panel are
  // in two or three parts. Tiles 0 and 2 sum the products of the first parts. Tiles 1 and 3 sum the
  // other products, in the order of `others` in EmulatedTiles. Tiles 4 and 5 are rows, 6 and 7 are
  // panels.
  template <int rows, int parts>
  RNNFAST_INLINE static void multiply_parts(const MatrixFactors& factors, int, float* sums) {
    __asm__ volatile("" ::: "memory");  // as above
    const index row_bytes = factors.row * 2, word_bytes = factors.word * 2,
                part = matrix_words * factors.word;
    const Bfloat16 *a0 = factors.a[0], *a1 = factors.a[1], *b = factors.b[0];
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (rows > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (index group = 0; group < factors.groups; ++group) {
      _tile_loadd(6, b, word_bytes);
      _tile_loadd(4, a0, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + part, word_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (rows > 1) {
        _tile_loadd(5, a1, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if constexpr (parts > 2) {
        _tile_loadd(6, b + 2 * part, word_bytes);
        _tile_dpbf16ps(1, 4, 6);
        if constexpr (rows > 1) _tile_dpbf16ps(3, 5, 6);
        _tile_loadd(6, b, word_bytes);
      }
      _tile_loadd(4, a0 + matrix_depth, row_bytes);
      if constexpr (parts > 2) _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(1, 4, 6);
      if constexpr (rows > 1) {
        _tile_loadd(5, a1 + matrix_depth, row_bytes);
        if constexpr (parts > 2) _tile_dpbf16ps(3, 5, 7);
        _tile_dpbf16ps(3, 5, 6);
      }
      if constexpr (parts > 2) {
        _tile_loadd(4, a0 + 2 * matrix_depth, row_bytes);
        _tile_dpbf16ps(1, 4, 6);
        if constexpr (rows > 1) {
          _tile_loadd(5, a1 + 2 * matrix_depth, row_bytes);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
      a0 += parts * matrix_depth;
      b += parts * part;
      if constexpr (rows > 1) a1 += parts * matrix_depth;
    }
    constexpr int size = matrix_rows * matrix_units;
    _tile_stored(0, sums, matrix_units * 4);
    _tile_stored(1, sums + size, matrix_units * 4);
    if constexpr (rows > 1) {
      _tile_stored(2, sums + 2 * size, matrix_units * 4);
      _tile_stored(3, sums + 3 * size, matrix_units * 4);
    }
  }
};
using Tiles = AmxTiles;
#else
using Tiles = EmulatedTiles;
#endif

// As tile() of product.h: multiplies `rows` rows by `panels` panels of `gates` gates. The rows are
// padded (extent.h), and lie at equal distances.
template <int parts>
struct MatrixTile {
  static constexpr int most_rows = 2 * matrix_rows;

  int rows, panels, gates;

  void operator()(const Bfloat16* const* a, const Bfloat16* b, float* const* c, const float* init,
                  const Extent& extent) const {
    constexpr int per_product = parts == 1 ? 2 : 1;  // panel tiles
    const index groups = extent.depth.outer;
    index begin = 0;
    do {
      const index end = begin + slice_groups < groups ? begin + slice_groups : groups;
      for (int column = 0; column < panels * gates; column += per_product) {
        MatrixFactors factors{{}, {}, rows > 1 ? a[1] - a[0] : 0, extent.step, end - begin};
        for (int i = 0; i * matrix_rows < rows; ++i)
          factors.a[i] = a[i * matrix_rows] + begin * parts * matrix_depth;
        const int left = panels * gates - column, columns = left < per_product ? left : per_product;
        for (int j = 0; j < columns; ++j)
          factors.b[j] = b + (column + j) / gates * extent.panel + (column + j) % gates * extent.gate +
                         begin * parts * matrix_words * extent.step;
        alignas(64) float sums[4 * matrix_rows * matrix_units];
        multiply(factors, columns, sums);
        for (int j = 0; j < columns; ++j)
          add(sums + j * matrix_rows * matrix_units, parts == 1 ? columns : 2, column + j, c,
              begin == 0 ? init : nullptr, extent);
      }
      begin = end;
    } while (begin < groups);
  }

 private:
  // The groups of a slice. Rows of 128 float32 in three parts fill half of the L1 cache.
  static constexpr index slice_groups = parts == 1 ? slice<Bfloat16> / matrix_words : 4;

  void multiply(const MatrixFactors& factors, int columns, float* sums) const {
    const bool two_rows = rows > matrix_rows;
    if constexpr (parts > 1)
      two_rows ? Tiles::multiply_parts<2, parts>(factors, rows, sums)
               : Tiles::multiply_parts<1, parts>(factors, rows, sums);
    else if (columns == 2)
      two_rows ? Tiles::multiply_tiles<2, 2>(factors, rows, sums)
               : Tiles::multiply_tiles<1, 2>(factors, rows, sums);
    else
      two_rows ? Tiles::multiply_tiles<2, 1>(factors, rows, sums)
               : Tiles::multiply_tiles<1, 1>(factors, rows, sums);
  }

  // Adds the sums of one gate of a panel, with `tiles` tiles for each tile of rows, to the result.
  void add(const float* sums, int tiles, int column, float* const* c, const float* init,
           const Extent& extent) const {
    const int panel = column / gates, gate = column % gates;
    for (int r = 0; r < rows; ++r) {
      const float* sum =
          sums + (r / matrix_rows * tiles * matrix_rows + r % matrix_rows) * matrix_units;
      float* to = c[r] + panel * extent.c_panel + gate * matrix_units;
      const float* from = init ? init + panel * extent.init_panel + gate * matrix_units : to;
      Vector<float> v = load(sum);
      if constexpr (parts > 1) {
        // An infinity times the lesser parts of a number is NaN, or has another sign.
        const Vector<float> other = load(sum + matrix_rows * matrix_units);
        v += other - other == Vector<float>{} ? other : Vector<float>{};
      }
      store(to, load(from) + v);
    }
  }
};

}  // namespace rnnfast::RNNFAST_TARGET

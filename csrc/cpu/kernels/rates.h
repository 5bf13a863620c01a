// What limits a step, each alone: the multiply-adds of a unit, the products of a layer's states, the
// formula of a cell, and the reading of weights. cpu/rates.h measures how fast they are.
#pragma once

#include "cpu/kernels/product.h"
#include "cpu/kernels/states.h"

namespace rnnfast::RNNFAST_TARGET {

// The compiler must assume that `numbers` are read and changed here, so it can fold no loop.
template <class Numbers>
RNNFAST_INLINE void opaque(Numbers& numbers) {
  __asm__ volatile("" : "+m"(numbers));
}

// Independent multiply-adds in registers, of vectors. Returns the number of operations.
template <class T>
double vector_peak(long rounds) {
  using V = Vector<T>;
  // Two multiply-adds a cycle, each four or five cycles long, need eight to ten chains.
  constexpr int chains = 12, repeats = 16;
  V acc[chains];
  T number[lanes<T> * per_word<T>];
  for (T& x : number) x = narrow<T>(Real<T>(1e-3));
  Words<T> a = load_words<T>(number), b = a;
  for (int i = 0; i < chains; ++i) acc[i] = splat<V>(Real<T>(i));
  for (long n = 0; n < rounds; ++n) {
    opaque(a), opaque(b);
    const Words<T> x = a, y = b;
#pragma GCC unroll 32
    for (int repeat = 0; repeat < repeats; ++repeat)
#pragma GCC unroll 32
      for (int i = 0; i < chains; ++i) acc[i] = multiply_add<T>(x, y, acc[i]);
  }
  for (int i = 1; i < chains; ++i) acc[0] += acc[i];
  opaque(acc[0]);
  return 2.0 * repeats * chains * lanes<T> * per_word<T> * static_cast<double>(rounds);
}

// Products of the matrix unit: 32 rows by two panels. The sum is so long that its store does not count.
// Row r of a group is row r - 1 of the group after it, and a panel repeats one word, so that all of
// them fit the L1 cache. Returns the number of operations.
inline double matrix_peak(long rounds) {
  const MatrixUnit<matrix_unit != Unit::NONE> unit;
  constexpr index groups = 64, size = (matrix_rows + groups) * matrix_depth;
  alignas(64) Bfloat16 rows[size] = {}, word[lanes<Bfloat16> * 2] = {};
  alignas(64) float sums[4 * matrix_rows * matrix_units];
  const MatrixFactors factors{{rows, rows}, {word, word}, matrix_depth, 0, groups};
  for (long n = 0; n < rounds; ++n) {
    opaque(rows), opaque(word);
    Tiles::multiply_tiles<2, 2>(factors, 2 * matrix_rows, sums);
    opaque(sums);
  }
  return 2.0 * 4 * matrix_rows * matrix_units * groups * matrix_depth * static_cast<double>(rounds);
}

// Calls f(stage) with each stage as a constant, the first stage first.
template <class F, int... stage>
RNNFAST_INLINE void for_stages(F f, std::integer_sequence<int, stage...>) {
  (f(std::integral_constant<int, stage>{}), ...);
}

// The recurrent products of a step in the tiles of the time loop, without the formula: the states of a
// batch by the weights of a thread's share of the units. The memory is zeros, and so are the results.
template <class Cell, class T>
class StepProducts {
 public:
  // With a null base it only counts the memory.
  StepProducts(index batch, index hidden, int rank, int threads, void* base)
      : batch_(batch), hidden_(hidden), blocks_(share(blocks_of<T>(hidden), threads, rank)) {
    Arena arena(base);
    states_ = arena.template take<Operand<T>>(padded_rows<T>(batch) * padded_width<T>(hidden));
    for (int s = 0; s < Cell::stages; ++s)
      panels_[s] = arena.template take<Operand<T>>(blocks_.size() * shape(s).size);
    slots_ = arena.template take<Real<T>>(blocks_.size() * batch * slot_numbers);
    bytes_ = arena.used();
  }

  index bytes() const { return bytes_; }

  // Returns the number of operations.
  double run(long rounds) const {
    const FlushDenormals guard;
    const MatrixUnit<on_matrix_unit<T>> unit;
    index gates = 0;
    for (long n = 0; n < rounds; ++n)
      for_stages([&](auto stage) { multiply<stage>(n % 2 == 1); },
                 std::make_integer_sequence<int, Cell::stages>{});
    for (const Window window : Cell::recurrent) gates += window.width();
    const index end = blocks_.end * lanes<T>, units = (end < hidden_ ? end : hidden_) - first_unit();
    return 2.0 * static_cast<double>(batch_ * units * gates * hidden_) * static_cast<double>(rounds);
  }

 private:
  static constexpr int slot_numbers = Cell::slots * lanes<T>;

  PanelShape<T> shape(int stage) const { return {Cell::recurrent[stage].width(), hidden_}; }
  index first_unit() const { return blocks_.begin * lanes<T>; }

  template <int stage>
  void multiply(bool descending) const {
    constexpr Window window = Cell::recurrent[stage];
    const PanelShape<T> panel = shape(stage);
    const index block_stride = batch_ * slot_numbers;
    const Extent extent{contiguous<T>(hidden_), panel.size, panel.step, block_stride, 0, panel.gate};
    for (index begin = 0; begin < batch_; begin += strip) {
      const index rows = batch_ - begin < strip ? batch_ - begin : strip;
      const Operand<T>* a[strip];
      for (index r = 0; r < rows; ++r) a[r] = states_ + (begin + r) * padded_width<T>(hidden_);
      for_each_tile<T, window.width()>(
          rows, {0, blocks_.size()}, descending,
          [&](index row, int count, index block, int, TileFunction<T> tile) {
            Real<T>* c[tile_rows<T>];
            for (int r = 0; r < count; ++r)
              c[r] = slots_ + block * block_stride + (begin + row + r) * slot_numbers +
                     window.begin * lanes<T>;
            tile(a + row, panels_[stage] + block * panel.size, c, nullptr, extent);
          });
    }
  }

  index batch_, hidden_, bytes_;
  Range blocks_;
  Operand<T>*states_, *panels_[Cell::stages];
  Real<T>* slots_;
};

// Rows of one block of units, which fit the L1 cache.
template <class Cell, class T>
struct FormulaRows {
  static constexpr int count = 16, L = lanes<T>;

  alignas(64) Real<T> pre_activations[count][Cell::gates * L], slots[count][Cell::slots * L];
  Real<T> c[count][L], dh[count][L], dc[count][L];
  T h[count][L], y[count][L], dy[count][L], d[count][Cell::gates * L];

  FormulaRows() {
    for (int row = 0; row < count; ++row) {
      fill(pre_activations[row]), fill(slots[row]), fill(c[row]), fill(dh[row]), fill(dc[row]);
      fill(h[row]), fill(y[row]), fill(dy[row]), fill(d[row]);
    }
  }

 private:
  template <class N, int n>
  static void fill(N (&numbers)[n]) {
    for (int k = 0; k < n; ++k) numbers[k] = narrow<N>(Real<N>(0.1 + 0.8 * k / n));
  }
};

// The formula of a cell, forward or backward, for all rows of FormulaRows, in pairs as in the time
// loops. Returns the number of units, each of one row and one step.
template <class Cell, class T>
double formula(bool backward, long rounds) {
  using V = VectorPair<Vector<T>>;
  using Stages = std::make_integer_sequence<int, Cell::stages>;
  constexpr int L = lanes<T>;
  FormulaRows<Cell, T> rows;
  const auto read = [](const auto* numbers, index row_size) {
    return gather<V>([&](int r) { return load(numbers + r * row_size); });
  };
  const auto write = [](auto* numbers, index row_size, V v) {
    scatter(v, [&](int r, Vector<T> x) { store(numbers + r * row_size, x); });
  };
  for (long n = 0; n < rounds; ++n) {
    opaque(rows);
    for (int row = 0; row < rows.count; row += 2) {
      V v[Cell::slots] = {}, h = read(rows.h[row], L), c = read(rows.c[row], L);
      if (backward) {
        V d[Cell::gates] = {}, dh = read(rows.dh[row], L), dc = read(rows.dc[row], L);
        const V grad = dh + read(rows.dy[row], L);
#pragma GCC unroll 8
        for (int slot = 0; slot < Cell::slots; ++slot)
          v[slot] = read(rows.slots[row] + slot * L, Cell::slots * L);
        for_stages(
            [&](auto stage) {
              Cell::template backward<Cell::stages - 1 - stage>(v, h, c, grad, d, dh, dc);
            },
            Stages{});
#pragma GCC unroll 8
        for (int gate = 0; gate < Cell::gates; ++gate)
          write(rows.d[row] + gate * L, Cell::gates * L, d[gate]);
        write(rows.dh[row], L, dh);
        if constexpr (Cell::cell_state >= 0) write(rows.dc[row], L, dc);
      } else {
        V y;
#pragma GCC unroll 8
        for (int gate = 0; gate < Cell::gates; ++gate)
          v[gate] = read(rows.pre_activations[row] + gate * L, Cell::gates * L);
        for_stages([&](auto stage) { y = Cell::template forward<stage>(v, h, c); }, Stages{});
#pragma GCC unroll 8
        for (int slot = 0; slot < Cell::slots; ++slot)
          write(rows.slots[row] + slot * L, Cell::slots * L, v[slot]);
        write(rows.y[row], L, y);
      }
    }
  }
  opaque(rows);
  return static_cast<double>(rounds) * rows.count * L;
}

// Reads `bytes` bytes, in the order of memory or against it, in lines of 64 bytes.
inline void read_lines(const char* data, index bytes, bool descending) {
  constexpr int line = 64, vectors = line / RNNFAST_VECTOR_BYTES, lines = 4;
  using V = Vector<int>;
  V sum[lines * vectors] = {};
  const auto add = [&](index begin, int count) {
#pragma GCC unroll 16
    for (int k = 0; k < count * vectors; ++k) {
      V v;
      __builtin_memcpy(&v, data + begin + k * RNNFAST_VECTOR_BYTES, sizeof v);
      sum[k] ^= v;
    }
  };
  const index pieces = bytes / (lines * line), rest = pieces * lines * line;
  if (descending)
    for (index piece = pieces; piece-- > 0;) add(piece * lines * line, lines);
  else
    for (index piece = 0; piece < pieces; ++piece) add(piece * lines * line, lines);
  for (index begin = rest; begin + line <= bytes; begin += line) add(begin, 1);
  opaque(sum);
}

}  // namespace rnnfast::RNNFAST_TARGET

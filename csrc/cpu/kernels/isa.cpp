// Compiled once for each instruction set; exports one table. Everything else stays in the namespace of
// the instruction set (RNNFAST_TARGET), so that the linker can never share code between them.
#include "cpu/kernel_table.h"

#include "cpu/kernels/backward.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/head.h"
#include "cpu/kernels/rates.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// The type in which a caller has numbers of type T.
template <class T>
using Stored = std::conditional_t<(parts_of<T> > 0), float, T>;

template <class Cell, class T>
struct Entry {
  using S = Stored<T>;

  // A layer of numbers in parts describes the same memory as one of float.
  static Layer<T> typed(const Layer<S>& layer) { return __builtin_bit_cast(Layer<T>, layer); }
  static Gradients<T> typed(const Gradients<S>& grads) {
    return __builtin_bit_cast(Gradients<T>, grads);
  }

  static index forward_scratch(const Layer<S>& layer) {
    return Forward<Cell, T>(typed(layer), {}, nullptr).scratch();
  }
  static void forward(const Layer<S>& layer, const Team& team, void* scratch) {
    Forward<Cell, T>(typed(layer), team, scratch).run();
  }
  static index panels_size(const Layer<S>& layer) {
    return Forward<Cell, T>(typed(layer), {}, nullptr).panels_size();
  }
  static void pack(const Layer<S>& layer) {
    Forward<Cell, T>(typed(layer), Team{0, 1, Split::rows, nullptr}, nullptr).pack_panels();
  }
  static int backward_groups(const Layer<S>& layer) { return Backward<Cell, T>::groups(typed(layer)); }
  static index backward_scratch(const Layer<S>& layer, const Gradients<S>& grads) {
    return Backward<Cell, T>(typed(layer), typed(grads), nullptr).scratch();
  }
  static void backward(const Layer<S>& layer, const Gradients<S>& grads, const Team& team,
                       void* scratch) {
    Backward<Cell, T>(typed(layer), typed(grads), scratch).run(team);
  }

  static index step_products_bytes(index batch, index hidden, int rank, int threads) {
    return StepProducts<Cell, T>(batch, hidden, rank, threads, nullptr).bytes();
  }
  static double step_products(index batch, index hidden, int rank, int threads, void* memory,
                              long rounds) {
    return StepProducts<Cell, T>(batch, hidden, rank, threads, memory).run(rounds);
  }

  static constexpr CellKernels<S> kernels = {
      &saved_row<Cell, T>, &forward_scratch,  &forward,  &panels_size,      &pack,
      &backward_groups,    &backward_scratch, &backward, &formula<Cell, S>, &step_products_bytes,
      &step_products};
};

template <class T, class... Cell>
const CellKernels<Stored<T>>* kernels_of(CellList<Cell...>) {
  static constexpr CellKernels<Stored<T>> table[] = {Entry<Cell, T>::kernels...};
  return table;
}

template <class T>
struct HeadEntry {
  static index packed_bytes(const Head<T>& head) { return HeadProduct<T>(head).packed_bytes(); }
  static index width(const Head<T>& head) { return HeadProduct<T>(head).width(); }
  static void pack(const Head<T>& head) { HeadProduct<T>(head).pack(); }
  static index scratch(const Head<T>& head) { return HeadProduct<T>(head).scratch(); }
  static void multiply(const Head<T>& head, int part, int parts, void* scratch) {
    HeadProduct<T>(head).multiply(part, parts, scratch);
  }

  static constexpr HeadKernels<T> kernels = {&packed_bytes,   &width,        &pack,
                                             &scratch,        &multiply,     &highest<Real<T>>,
                                             &weigh<Real<T>>, &find<Real<T>>};
};

template <class... Cell>
const CellInfo* info_of_all(CellList<Cell...>) {
  static constexpr CellInfo table[] = {info_of<Cell>()...};
  return table;
}

// Whether the unit computes the very sums that the emulation does: of 23 rows in three parts.
bool unit_works() {
  const MatrixUnit<matrix_unit != Unit::NONE> unit;
  const FlushDenormals guard;
  constexpr int rows = 23, groups = 3, parts = 3;
  constexpr index row = groups * parts * matrix_depth, word = lanes<Bfloat16> * 2;
  alignas(64) Bfloat16 a[2 * matrix_rows * row], b[2 * groups * parts * matrix_words * word];
  std::uint32_t state = 1;
  const auto fill = [&](Bfloat16* numbers, index count) {
    for (index k = 0; k < count; ++k) {
      state = state * 1664525 + 1013904223;
      numbers[k] = narrow<Bfloat16>(static_cast<float>(static_cast<std::int32_t>(state)) * 1e-9f);
    }
  };
  fill(a, 2 * matrix_rows * row);
  fill(b, 2 * groups * parts * matrix_words * word);
  const MatrixFactors factors{
      {a, a + matrix_rows * row}, {b, b + groups * parts * matrix_words * word}, row, word, groups};
  alignas(64) float sums[2][4 * matrix_rows * matrix_units] = {};
  const auto same = [&] {
    for (int tile = 0; tile < 4; ++tile)
      for (int r = 0; r < matrix_rows && tile / 2 * matrix_rows + r < rows; ++r)
        for (int u = 0; u < matrix_units; ++u) {
          const int k = (tile * matrix_rows + r) * matrix_units + u;
          if (sums[0][k] != sums[1][k]) return false;
        }
    return true;
  };
  Tiles::multiply_tiles<2, 2>(factors, rows, sums[0]);
  EmulatedTiles::multiply_tiles<2, 2>(factors, rows, sums[1]);
  if (!same()) return false;
  Tiles::multiply_parts<2, parts>(factors, rows, sums[0]);
  EmulatedTiles::multiply_parts<2, parts>(factors, rows, sums[1]);
  return same();
}

// RNNFAST_NUMBERS is the sum of the NumberBits of the types that are built. The other types have the
// kernels of an earlier instruction set.
#if !defined(RNNFAST_NUMBERS)
#define RNNFAST_NUMBERS 63
#endif
enum NumberBit { float32_bit = 1, float64_bit = 2, bfloat16_bit = 4, first_part_bit = 8 };

template <class T, NumberBit bit>
constexpr NumberKernels<T> numbers() {
  if constexpr (RNNFAST_NUMBERS & bit)
    return {kernels_of<T>(Cells{}), &vector_peak<T>, on_matrix_unit<T> ? matrix_rows : 0,
            HeadEntry<T>::kernels};
  else
    return {};
}

// float32 in 1, 2 and 3 parts has the bits 8, 16 and 32.
template <int parts>
constexpr NumberKernels<float> in_parts() {
  if constexpr (matrix_unit != Unit::NONE && (RNNFAST_NUMBERS & (first_part_bit << (parts - 1))))
    return {kernels_of<InParts<parts>>(Cells{}), nullptr, matrix_rows, {}};
  else
    return {};
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {RNNFAST_ISA_NAME,
                         matrix_unit == Unit::EMULATED,
                         matrix_unit == Unit::AMX ? &unit_works : nullptr,
                         matrix_unit == Unit::NONE ? nullptr : &matrix_peak,
                         &read_lines,
                         RNNFAST_VECTOR_BYTES,
                         Cells::size,
                         info_of_all(Cells{}),
                         numbers<float, float32_bit>(),
                         numbers<double, float64_bit>(),
                         numbers<Bfloat16, bfloat16_bit>(),
                         {in_parts<1>(), in_parts<2>(), in_parts<3>()}};

}  // namespace rnnfast::RNNFAST_TARGET

#include "python/rates.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "core/views.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/rates.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

constexpr const char* matrix = "matrix";

// The units that multiply, in the instruction set in use: vectors of a dtype, and the matrix unit.
std::vector<std::string> units() {
  std::vector<std::string> names = {"float32", "float64", "bfloat16"};
  if (kernels().matrix_peak) names.emplace_back(matrix);
  return names;
}

// The bfloat16 parts of a number in the products of a layer; 0: the number itself.
int parts_of_layer(Dtype number, int precision, index hidden) {
  if (precision < 0 || precision > 2)
    throw py::value_error("precision is " + std::to_string(precision) +
                          "; expected 0 (highest), 1 (high) or 2 (medium)");
  return number == Dtype::float32 ? float32_parts(static_cast<Precision>(precision), hidden) : 0;
}

// The unit that multiplies in a layer, its products for each product of the layer, and the bytes of a
// packed weight.
std::tuple<std::string, int, int> product_unit(const std::string& dtype, int precision, index hidden) {
  const Dtype number = number_named(dtype);
  const int parts = parts_of_layer(number, precision, hidden);
  if (parts > 0) return {matrix, parts * (parts + 1) / 2, parts * static_cast<int>(sizeof(Bfloat16))};
  return with_numbers(number, [&](auto n) -> std::tuple<std::string, int, int> {
    const bool on_matrix = kernels().of<decltype(n)>().matrix_rows > 0;
    return {on_matrix ? matrix : dtype, 1, static_cast<int>(sizeof n)};
  });
}

void check(int threads, double seconds) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected >= 1");
  if (!(seconds >= 0))
    throw py::value_error("seconds is " + std::to_string(seconds) + "; expected >= 0");
}

double measured(const std::function<double(int, long)>& run, int threads, double seconds) {
  check(threads, seconds);
  const py::gil_scoped_release release;
  return rate(run, threads, seconds);
}

double peak_flops(const std::string& unit, int threads, double seconds) {
  const auto peak_of_vectors = [&] {
    return with_numbers(number_named(unit),
                        [](auto n) { return kernels().of<decltype(n)>().vector_peak; });
  };
  const auto peak = unit == matrix ? kernels().matrix_peak : peak_of_vectors();
  if (!peak)
    throw py::value_error("the instruction set " + std::string(kernels().name) + " has no matrix unit");
  return measured([peak](int, long rounds) { return peak(rounds); }, threads, seconds);
}

double product_rate(int cell, const std::string& dtype, int precision, index batch, index hidden,
                    int threads, double seconds) {
  cell_info(cell);  // throws where there is no such cell
  constexpr index most = index{1} << 20;
  if (batch < 1 || hidden < 1 || batch > most || hidden > most)
    throw py::value_error("batch is " + std::to_string(batch) + " and hidden " +
                          std::to_string(hidden) + "; expected 1 to " + std::to_string(most));
  check(threads, seconds);
  const Dtype number = number_named(dtype);
  const int parts = parts_of_layer(number, precision, hidden);
  return with_numbers(number, [&](auto n) {
    using T = decltype(n);
    const auto* kernels_of_number = &kernels().of<T>();
    if constexpr (sizeof(T) == 4)
      if (parts > 0) kernels_of_number = &kernels().in_parts[parts - 1];
    const CellKernels<T>& table = kernels_of_number->cells[cell];
    const index lanes = kernels().vector_bytes / index{sizeof(Real<T>)};
    // More threads than blocks of units would have nothing to do.
    const int count = usable(static_cast<int>(std::min<index>(threads, (hidden + lanes - 1) / lanes)));
    std::vector<std::unique_ptr<Memory>> memory;
    for (int rank = 0; rank < count; ++rank) {
      const index bytes = table.step_products_bytes(batch, hidden, rank, count);
      memory.push_back(std::make_unique<Memory>(static_cast<std::size_t>(bytes)));
      std::memset(memory.back()->data(), 0, memory.back()->size());
    }
    return measured(
        [&](int rank, long rounds) {
          return table.step_products(batch, hidden, rank, count,
                                     memory[static_cast<std::size_t>(rank)]->data(), rounds);
        },
        count, seconds);
  });
}

double formula_rate(int cell, const std::string& dtype, bool backward, int threads, double seconds) {
  cell_info(cell);  // throws where there is no such cell
  const auto formula = with_numbers(number_named(dtype), [&](auto number) {
    return kernels().of<decltype(number)>().cells[cell].formula;
  });
  return measured([=](int, long rounds) { return formula(backward, rounds); }, threads, seconds);
}

double measure_read_rate(index bytes, int threads, double seconds) {
  if (bytes < 1 || bytes % 64 != 0)
    throw py::value_error("bytes is " + std::to_string(bytes) + "; expected a multiple of 64, >= 64");
  check(threads, seconds);
  const int count = usable(threads);  // asked once, since the process may get more processors meanwhile
  const ReadBuffers buffers(bytes, count);
  return measured([&](int rank, long rounds) { return buffers.read(rank, rounds); }, count, seconds);
}

}  // namespace

void add_rates(py::module_& m) {
  m.def("units", &units);
  m.def("product_unit", &product_unit);
  m.def("peak_flops", &peak_flops);
  m.def("product_rate", &product_rate);
  m.def("formula_rate", &formula_rate);
  m.def("read_rate", &measure_read_rate);
}

}  // namespace rnnfast

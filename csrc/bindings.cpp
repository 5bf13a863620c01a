// The module _C: tensors in, structs out, the GIL released while a kernel runs. Every size is checked
// here, before any address is used; nothing is written when a check fails.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/run.h"
#include "stack.h"
#include "views.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

// The steps of a packed layer, in the order of processing; see Steps.
struct Packing {
  Packing(const View& batch_sizes, bool reverse) {
    if (!batch_sizes) return;
    if (batch_sizes.dtype() != Dtype::int64 || batch_sizes.dims() != 1 || batch_sizes.size(0) < 1)
      throw py::value_error("batch_sizes must be int64 and have one dimension with at least one entry");
    const index steps = batch_sizes.size(0);
    const auto* sizes = static_cast<const std::int64_t*>(batch_sizes.data());
    for (index t = 0; t < steps; ++t) {
      count.push_back(sizes[t * batch_sizes.stride(0)]);
      first.push_back(rows);
      if (count[t] < 1 || (t > 0 && count[t] > count[t - 1]) ||
          __builtin_add_overflow(rows, count[t], &rows))
        throw py::value_error("batch_sizes must be positive and never grow; entry " +
                              std::to_string(t) + " is " + std::to_string(count[t]));
    }
    batch = count[0];
    if (reverse) {
      std::reverse(count.begin(), count.end());
      std::reverse(first.begin(), first.end());
    }
    before.push_back(0);
    for (index n : count) before.push_back(before.back() + n);
  }

  Steps steps() const { return {first.data(), count.data(), before.data()}; }

  std::vector<index> first, count, before;
  index batch = 0, rows = 0;
};

index saved_row(int cell, bool float64, index hidden) {
  return float64 ? kernels().of<double>(cell).saved_row(hidden)
                 : kernels().of<float>(cell).saved_row(hidden);
}

// The tensors of a call come in tuples, in the order of the structs in layer.h.
template <std::size_t n>
std::array<py::handle, n> unpack(const py::tuple& tuple, const char* name) {
  if (tuple.size() != n)
    throw py::value_error(std::string(name) + " has " + std::to_string(tuple.size()) +
                          " entries; expected " + std::to_string(n));
  std::array<py::handle, n> items;
  for (std::size_t k = 0; k < n; ++k) items[k] = tuple[k];
  return items;
}

using Inputs = std::array<py::handle, 8>;   // x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
using Outputs = std::array<py::handle, 4>;  // y, h_n, c_n, saved

struct LayerViews {
  LayerViews(int number, bool reversed, py::handle batch_sizes, const Inputs& in, const Outputs& out)
      : cell(number),
        reverse(reversed),
        is_packed(!batch_sizes.is_none()),
        info(cell_info(cell)),
        packing(View(batch_sizes, "batch_sizes", false), reverse),
        x(in[0], "x", false),
        h0(in[1], "h0", false),
        c0(in[2], "c0", false),
        w_ih(in[3], "w_ih", false),
        w_hh(in[4], "w_hh", false),
        b_ih(in[5], "b_ih", false),
        b_hh(in[6], "b_hh", false),
        w_hr(in[7], "w_hr", false),
        y(out[0], "y", true),
        h_n(out[1], "h_n", true),
        c_n(out[2], "c_n", true),
        saved(out[3], "saved", true) {
    for (const View* view : {&x, &w_ih, &w_hh, &y}) require(*view);
    const Checker check(x);
    const int dims = is_packed ? 2 : 3;
    if (x.dims() != dims)
      throw py::value_error("x has shape " + x.shape_text() + "; expected " +
                            (is_packed ? "(sum of batch_sizes, I)" : "(T, B, I)"));
    if (w_hh.dims() != 2)
      throw py::value_error("w_hh has shape " + w_hh.shape_text() + "; expected (G * H, " +
                            (w_hr ? "R)" : "H)"));
    if (w_hr && !info.projects)
      throw py::value_error(std::string("the cell ") + info.name + " has no projection w_hr");
    if (w_hr && w_hr.dims() != 2)
      throw py::value_error("w_hr has shape " + w_hr.shape_text() + "; expected (R, H)");
    steps = is_packed ? static_cast<index>(packing.count.size()) : x.size(0);
    batch = is_packed ? packing.batch : x.size(1);
    inputs = x.size(dims - 1);
    outputs = w_hh.size(1);
    hidden = w_hr ? w_hr.size(1) : outputs;
    if (steps < 1) throw py::value_error("x has no steps");
    if (outputs < 1) throw py::value_error("w_hh has no columns");
    if (hidden < 1) throw py::value_error("w_hr has no columns");
    const index gates = info.weight_blocks * hidden;
    check_sequence(check, x, inputs);
    check.shape(h0, {batch, outputs});
    check.shape(c0, {batch, hidden});
    check.shape(w_ih, {gates, inputs});
    check.shape(w_hh, {gates, outputs});
    check.shape(b_ih, {gates});
    check.shape(b_hh, {gates});
    check.shape(w_hr, {outputs, hidden});
    check_sequence(check, y, outputs);
    check.shape(h_n, {batch, outputs});
    check.shape(c_n, {batch, hidden});
    if (!info.cell_state && (c0 || c_n))
      throw py::value_error(std::string("the cell ") + info.name + " has no cell state c");
    if (saved) {
      const index rows = is_packed ? packing.rows : steps * batch;
      check.shape(saved, {rows * saved_row(cell, x.dtype() == Dtype::float64, hidden)});
    }
  }

  void check_sequence(const Checker& check, const View& view, index features) const {
    if (is_packed)
      check.shape(view, {packing.rows, features});
    else
      check.shape(view, {steps, batch, features});
  }

  template <class T>
  Layer<T> layer() const {
    return {steps,
            batch,
            inputs,
            hidden,
            outputs,
            is_packed ? packing.steps() : Steps{},
            sequence<const T>(x, reverse),
            matrix<const T>(h0),
            matrix<const T>(c0),
            matrix<const T>(w_ih),
            matrix<const T>(w_hh),
            vector<const T>(b_ih),
            vector<const T>(b_hh),
            matrix<const T>(w_hr),
            sequence<T>(y, reverse),
            matrix<T>(h_n),
            matrix<T>(c_n),
            vector<T>(saved)};
  }

  int cell;
  bool reverse, is_packed;
  const CellInfo& info;
  Packing packing;
  View x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, h_n, c_n, saved;
  index steps, batch, inputs, hidden, outputs;
};

void forward(int cell, bool reverse, int threads, py::handle batch_sizes, const py::tuple& inputs,
             const py::tuple& outputs) {
  const LayerViews views(cell, reverse, batch_sizes, unpack<8>(inputs, "inputs"),
                         unpack<4>(outputs, "outputs"));
  const py::gil_scoped_release release;
  if (views.x.dtype() == Dtype::float32)
    run_forward(cell, views.layer<float>(), threads);
  else
    run_forward(cell, views.layer<double>(), threads);
}

struct GradientViews {
  GradientViews(const std::array<py::handle, 3>& in, const Inputs& out)
      : y(in[0], "dy", false),
        h_n(in[1], "dh_n", false),
        c_n(in[2], "dc_n", false),
        x(out[0], "dx", true),
        h0(out[1], "dh0", true),
        c0(out[2], "dc0", true),
        w_ih(out[3], "dw_ih", true),
        w_hh(out[4], "dw_hh", true),
        b_ih(out[5], "db_ih", true),
        b_hh(out[6], "db_hh", true),
        w_hr(out[7], "dw_hr", true) {}

  void check(const LayerViews& layer) const {
    const Checker check(layer.x);
    const CellInfo& info = layer.info;
    const index gates = info.weight_blocks * layer.hidden;
    layer.check_sequence(check, y, layer.outputs);
    layer.check_sequence(check, x, layer.inputs);
    for (const View* state : {&h_n, &h0}) check.shape(*state, {layer.batch, layer.outputs});
    for (const View* state : {&c_n, &c0}) check.shape(*state, {layer.batch, layer.hidden});
    check.shape(w_ih, {gates, layer.inputs});
    check.shape(w_hh, {gates, layer.outputs});
    check.shape(b_ih, {gates});
    check.shape(b_hh, {gates});
    check.shape(w_hr, {layer.outputs, layer.hidden});
    if (w_hr && !layer.w_hr) throw py::value_error("dw_hr is wanted of a layer without w_hr");
    if (!info.cell_state && (c_n || c0))
      throw py::value_error(std::string("the cell ") + info.name + " has no cell state c");
  }

  template <class T>
  Gradients<T> gradients(bool reverse, bool accumulate_x) const {
    return {sequence<const T>(y, reverse),
            matrix<const T>(h_n),
            matrix<const T>(c_n),
            sequence<T>(x, reverse),
            accumulate_x,
            matrix<T>(h0),
            matrix<T>(c0),
            matrix<T>(w_ih),
            matrix<T>(w_hh),
            vector<T>(b_ih),
            vector<T>(b_hh),
            matrix<T>(w_hr)};
  }

  View y, h_n, c_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr;
};

void backward(int cell, bool reverse, int threads, py::handle batch_sizes, const py::tuple& inputs,
              py::handle y, py::handle saved, const py::tuple& grad_outputs,
              const py::tuple& grad_inputs, bool accumulate_dx) {
  const py::none none;
  const LayerViews layer(cell, reverse, batch_sizes, unpack<8>(inputs, "inputs"),
                         {y, none, none, saved});
  require(layer.saved);
  const GradientViews grads(unpack<3>(grad_outputs, "grad_outputs"),
                            unpack<8>(grad_inputs, "grad_inputs"));
  grads.check(layer);
  const py::gil_scoped_release release;
  if (layer.x.dtype() == Dtype::float32)
    run_backward(cell, layer.layer<float>(), grads.gradients<float>(reverse, accumulate_dx), threads);
  else
    run_backward(cell, layer.layer<double>(), grads.gradients<double>(reverse, accumulate_dx), threads);
}

// `saved` for `rows` rows of x.
std::unique_ptr<Memory> new_saved(int cell, bool float64, index rows, index hidden) {
  cell_info(cell);
  index bytes;
  if (rows < 0 || hidden < 0 || hidden > (index{1} << 40) ||
      __builtin_mul_overflow(rows, saved_row(cell, float64, hidden) * (float64 ? 8 : 4), &bytes))
    throw py::value_error("new_saved: an argument is out of range");
  return std::make_unique<Memory>(static_cast<std::size_t>(bytes));
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = RNNFAST_COMPILER;
  info["isas"] = built_isas();
  info["openmp"] = std::to_string(_OPENMP);
  return info;
}

std::vector<std::string> cells() {
  std::vector<std::string> names;
  for (int cell = 0; cell < kernels().cells; ++cell) names.push_back(kernels().info[cell].name);
  return names;
}

double measure_peak(const std::string& dtype, int threads, double seconds) {
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype is '" + dtype + "'; expected 'float32' or 'float64'");
  if (!(seconds >= 0)) throw py::value_error("seconds must not be negative");
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; expected >= 1");
  const py::gil_scoped_release release;
  return peak_flops(dtype == "float64", threads, seconds);
}

}  // namespace
}  // namespace rnnfast

PYBIND11_MODULE(_C, m) {
  using namespace rnnfast;
  kernels();  // an instruction set that RNNFAST_ISA forces in vain fails here, at import
  py::class_<Memory>(m, "Block", py::buffer_protocol()).def_buffer([](Memory& memory) {
    return py::buffer_info(static_cast<unsigned char*>(memory.data()),
                           static_cast<py::ssize_t>(memory.size()));
  });
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("infer", &infer);
  m.def("new_saved", &new_saved);
  m.def("release_memory", &release_memory);
  m.def("cells", &cells);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("supported_isas", &supported_isas);
  m.def("build_info", &build_info);
  m.def("max_threads", &max_threads);
  m.def("peak_flops", &measure_peak);
}

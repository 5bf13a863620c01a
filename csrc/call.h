// One call of a stack: its tensors, checked against each other, and what a kernel sees of them.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "packing.h"
#include "stack.h"
#include "views.h"

namespace rnnfast {

namespace py = pybind11;

// The weights of one direction of one layer, or their gradients.
struct Weights {
  Weights(const py::list& all, std::size_t at, bool bias, bool projected, bool gradients)
      : w_ih(all[at], gradients ? "dw_ih" : "w_ih", gradients),
        w_hh(all[at + 1], gradients ? "dw_hh" : "w_hh", gradients),
        b_ih(bias ? py::handle(all[at + 2]) : none(), gradients ? "db_ih" : "b_ih", gradients),
        b_hh(bias ? py::handle(all[at + 3]) : none(), gradients ? "db_hh" : "b_hh", gradients),
        w_hr(projected ? py::handle(all[at + (bias ? 4 : 2)]) : none(), gradients ? "dw_hr" : "w_hr",
             gradients) {}

  static py::handle none() { return Py_None; }
  template <class Test>
  bool all(Test test) const {
    return test(w_ih) && test(w_hh) && test(b_ih) && test(b_hh) && test(w_hr);
  }
  bool any() const {
    return !all([](const View& view) { return !view; });
  }

  View w_ih, w_hh, b_ih, b_hh, w_hr;
};

using AllWeights = std::vector<std::unique_ptr<Weights>>;

// The state of one layer and direction.
template <class T>
Matrix<T> state(const View& view, int number) {
  if (!view) return {};
  T* data = static_cast<T*>(view.data());
  return view.dims() == 2 ? Matrix<T>{data, view.stride(0)}
                          : Matrix<T>{data + number * view.stride(0), view.stride(1)};
}

// The tensors that forward and backward both read, and the sizes that all others must have. To be
// checked in the order of the functions here.
struct Call {
  Call(const Description& stack, const Inputs& inputs)
      : s(stack),
        info(cell_info(s.cell)),
        numbers(s.layers * s.directions),
        x(inputs.x, "x", false),
        h0(inputs.h0, "h0", false),
        c0(inputs.c0, "c0", false),
        weights(read(inputs.weights, false)),
        sizes(inputs.sizes, "sizes", false),
        reset(inputs.reset, "reset", false) {}

  void check_input() {
    require(x);
    is_packed = sizes && x.dims() == 2;
    is_step = x.dims() == 2 && !sizes && numbers == 1;
    if (x.dims() != (is_packed || is_step ? 2 : 3))
      throw py::value_error("x has shape " + x.shape_text() + "; expected " +
                            (s.batch_first ? "(B, T, I)" : "(T, B, I)"));
    if (is_packed) packing[0] = Packing::of_batch_sizes(sizes);
    const int time = s.batch_first ? 1 : 0;
    steps = is_packed ? packing[0].steps() : is_step ? 1 : x.size(time);
    batch = is_packed ? packing[0].batch() : is_step ? x.size(0) : x.size(1 - time);
    rows = is_packed ? packing[0].rows() : steps * batch;
    inputs = x.size(x.dims() - 1);
    if (steps < 1) throw py::value_error("x has no steps");
    if (sizes && !is_packed) packing[0] = Packing::of_lengths(sizes, batch, steps);
    longest = sizes ? packing[0].steps() : steps;
    if (sizes && s.directions == 2) packing[1] = packing[0].reversed();
    if (sizes && s.reverse) packing[0] = packing[0].reversed();
    check_sequence(Checker(x), x, inputs);
    check_reset();
  }

  // A bool for every row of x.
  void check_reset() const {
    if (!reset) return;
    if (reset.dtype() != Dtype::boolean)
      throw py::type_error("reset has dtype " + reset.dtype_name() + "; expected bool");
    const int dims = x.dims() - 1;
    bool same = reset.dims() == dims;
    for (int dim = 0; same && dim < dims; ++dim) same = reset.size(dim) == x.size(dim);
    if (!same)
      throw py::value_error("reset has shape " + reset.shape_text() +
                            "; expected that of x without its features, and x has " + x.shape_text());
  }

  // Whether other Python threads should run meanwhile: taking the GIL again costs a microsecond or,
  // where they do, up to five milliseconds. Some ten microseconds of arithmetic.
  bool is_long() const {
    const double of_steps = 2048.0 * steps * numbers;
    return of_steps + 1.0 * rows * numbers * info.weight_blocks * hidden * (inputs + outputs) > 1 << 18;
  }

  // Of the dtype of x, and in memory that kernels can read.
  bool has_like_weights() const {
    return std::all_of(weights.begin(), weights.end(), [&](const auto& w) {
      return w->all([&](const View& view) {
        return !view || (view.dtype() == x.dtype() && view.has_contiguous_rows());
      });
    });
  }

  void check_weights() {
    for (const auto& each : weights) {
      require(each->w_ih);
      require(each->w_hh);
      if (s.projected) require(each->w_hr);
    }
    const Weights& w = *weights[0];
    if (w.w_hh.dims() != 2)
      throw py::value_error("w_hh has shape " + w.w_hh.shape_text() + "; expected (G * H, " +
                            (s.projected ? "R)" : "H)"));
    if (w.w_hr && w.w_hr.dims() != 2)
      throw py::value_error("w_hr has shape " + w.w_hr.shape_text() + "; expected (R, H)");
    outputs = w.w_hh.size(1);
    hidden = w.w_hr ? w.w_hr.size(1) : outputs;
    width = s.directions * outputs;
    if (outputs < 1) throw py::value_error("w_hh has no columns");
    if (hidden < 1) throw py::value_error("w_hr has no columns");
    check_weights(Checker(x), weights);
  }

  void check_states() const { check_states(Checker(x), h0, c0); }

  AllWeights read(const py::list& list, bool gradients) const {
    const std::size_t each = (s.bias ? 4u : 2u) + (s.projected ? 1u : 0u);
    if (list.size() != each * static_cast<std::size_t>(numbers))
      throw py::value_error("the stack has " + std::to_string(each * static_cast<unsigned>(numbers)) +
                            " weights; got " + std::to_string(list.size()));
    AllWeights all;
    for (std::size_t at = 0; at < list.size(); at += each)
      all.push_back(std::make_unique<Weights>(list, at, s.bias, s.projected, gradients));
    return all;
  }

  void check_sequence(const Checker& check, const View& view, index features) const {
    if (is_packed || is_step)
      check.shape(view, {rows, features});
    else if (s.batch_first)
      check.shape(view, {batch, steps, features});
    else
      check.shape(view, {steps, batch, features});
  }

  void check_states(const Checker& check, const View& h, const View& c) const {
    const auto shape = [&](const View& view, index features) {
      if (is_step || s.single)
        check.shape(view, {batch, features});
      else
        check.shape(view, {numbers, batch, features});
    };
    shape(h, outputs);
    shape(c, hidden);
    if (c && !info.cell_state)
      throw py::value_error(std::string("the cell ") + info.name + " has no cell state c");
  }

  void check_cell_states(const Checker& check, const View& cell_states) const {
    check_sequence(check, cell_states, s.directions * hidden);
    if (cell_states && !info.cell_state)
      throw py::value_error(std::string("the cell ") + info.name + " has no cell states");
  }

  void check_weights(const Checker& check, const AllWeights& all) const {
    const index gates = info.weight_blocks * hidden;
    for (int number = 0; number < numbers; ++number) {
      const Weights& w = *all[static_cast<std::size_t>(number)];
      check.shape(w.w_ih, {gates, number < s.directions ? inputs : width});
      check.shape(w.w_hh, {gates, outputs});
      check.shape(w.b_ih, {gates});
      check.shape(w.b_hh, {gates});
      check.shape(w.w_hr, {outputs, hidden});
    }
  }

  // Layer::saved of every direction of every layer, then the outputs of all layers but the last.
  template <class T>
  Real<T>* saved_of(const View& saved, int number) const {
    return static_cast<Real<T>*>(saved.data()) + number * saved_part<T>();
  }
  template <class T>
  T* saved_output(const View& saved, int layer) const {
    return reinterpret_cast<T*>(saved_of<T>(saved, numbers)) + layer * rows * width;
  }
  template <class T>
  index saved_part() const {
    return rows * kernels().of<T>(s.cell).saved_row(hidden);
  }
  index saved_bytes() const {
    return with_numbers(x.dtype(), [&](auto number) {
      using T = decltype(number);
      return numbers * saved_part<T>() * index{sizeof(Real<T>)} +
             (s.layers - 1) * rows * width * index{sizeof(T)};
    });
  }

  // A sequence as a user's tensor has it, or one of `features` numbers a row without gaps.
  template <class T>
  Sequence<T> sequence(const View& view) const {
    if (!view) return {};
    T* data = static_cast<T*>(view.data());
    if (is_packed || is_step) return {data, 0, view.stride(0)};
    return s.batch_first ? Sequence<T>{data, view.stride(1), view.stride(0)}
                         : Sequence<T>{data, view.stride(0), view.stride(1)};
  }
  template <class T>
  Sequence<T> dense(T* data, index features) const {
    return {data, is_packed ? 0 : batch * features, features};
  }

  bool reverses(int direction) const { return s.reverse || direction == 1; }

  // What a direction sees of a sequence, in its order of processing.
  template <class T>
  Sequence<T> directed(Sequence<T> of, int direction) const {
    if (!of.data || is_packed || !reverses(direction)) return of;
    return {of.data + (longest - 1) * of.step, -of.step, of.row};
  }
  // The same of one that has the features of both directions side by side.
  template <class T>
  Sequence<T> own(Sequence<T> of, int direction) const {
    if (of.data) of.data += direction * outputs;
    return directed(of, direction);
  }

  // In the order of processing of a direction: a reset comes before its step there.
  Resets resets(int direction) const {
    const auto* data = static_cast<const std::uint8_t*>(reset.data());
    if (!data) return {};
    if (is_packed || is_step) return {data, 0, reset.stride(0)};
    const Sequence<const std::uint8_t> all{data, reset.stride(s.batch_first ? 1 : 0),
                                           reset.stride(s.batch_first ? 0 : 1)};
    const auto [first, step, row] = directed(all, direction);
    return {first, step, row};
  }

  // The cell states of the last layer, of both directions side by side.
  template <class T>
  Sequence<T> cell_states_of(const View& all_of, int k, int direction) const {
    Sequence<T> all = k == s.layers - 1 ? sequence<T>(all_of) : Sequence<T>{};
    if (all.data) all.data += direction * hidden;
    return directed(all, direction);
  }

  // Without x and y, which the caller fills in.
  template <class T>
  Layer<T> layer(int k, int direction, const View& cell_states, const View& h_n, const View& c_n,
                 Real<T>* saved, T* panels) const {
    const int number = k * s.directions + direction;
    const Weights& w = *weights[static_cast<std::size_t>(number)];
    return {longest,
            batch,
            k == 0 ? inputs : width,
            hidden,
            outputs,
            packing[direction].ragged(),
            resets(direction),
            {},
            state<const T>(h0, number),
            state<const T>(c0, number),
            matrix<const T>(w.w_ih),
            matrix<const T>(w.w_hh),
            vector<const T>(w.b_ih),
            vector<const T>(w.b_hh),
            matrix<const T>(w.w_hr),
            {},
            cell_states_of<T>(cell_states, k, direction),
            state<T>(h_n, number),
            state<T>(c_n, number),
            saved,
            panels};
  }

  const Description& s;
  const CellInfo& info;
  const int numbers;  // layers times directions
  bool is_packed = false, is_step = false;
  Packing packing[2];  // by direction
  const View x, h0, c0;
  const AllWeights weights;
  const View sizes, reset;
  index steps = 0, batch = 0, rows = 0, inputs = 0, hidden = 0, outputs = 0;
  index longest = 0;  // the steps of the longest row
  index width = 0;    // of a layer's output
};

}  // namespace rnnfast

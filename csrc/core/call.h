// One call of a stack: its tensors, checked against each other, and what a kernel sees of them.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/row_lengths.h"
#include "core/views.h"
#include "cpu/dispatch.h"

namespace rnnfast {

// Describes a stack of L layers with D directions; holds no tensor. layer.h says what T, B, I, H and R
// are. The tensors of a call:
// - A sequence is [T, B, I], [B, T, I] where `batch_first`, packed [rows, I], or [B, I] for one step of
//   one direction of one layer.
// - `sizes` is int64. It is absent where every row has every step. Of a packed x it is torch's
//   batch_sizes [T]. Of a padded x it is the length of each row [B]: steps past a row's length are
//   neither read nor computed, and their outputs are zero.
// - A state h is [L * D, B, R], a state c is [L * D, B, H]. Both lack the first dimension for a step,
//   and where the stack is `single`: one direction of one layer.
// - Weights are a flat list in torch's order: for each layer and direction w_ih, w_hh, then b_ih and
//   b_hh where there is `bias`, then w_hr where h is `projected`.
// - A state or bias that is absent means zeros (an input) or is not wanted (an output).
// - `reset` is bool and has the shape of x without its features. Where it is true, a row's states are
//   zero before that step in each direction's own order, in every layer.
// - `cell_states` are those of the last layer at every step, in the layout of x with D * H features.
struct Description {
  int cell, layers, directions;
  bool single;
  bool reverse;  // the only direction runs from the last step to the first
  bool bias, projected, batch_first;
  bool cell_states;  // whether to return them
  Precision precision;

  // Throws std::invalid_argument where the fields contradict each other.
  void check() const;
  // The number of weights of one direction of one layer.
  std::size_t weights_per_direction() const { return (bias ? 4u : 2u) + (projected ? 1u : 0u); }
  std::size_t weights() const {
    return weights_per_direction() * static_cast<std::size_t>(layers * directions);
  }
  // The name of weight `number` of the flat list, or of its gradient.
  const char* weight_name(std::size_t number, bool gradient) const;
};

// The weights of one direction of one layer, or their gradients.
struct Weights {
  View w_ih, w_hh, b_ih, b_hh, w_hr;

  template <class Test>
  bool all(Test test) const {
    return test(w_ih) && test(w_hh) && test(b_ih) && test(b_hh) && test(w_hr);
  }
  bool any() const {
    return !all([](const View& view) { return !view; });
  }
};

using AllWeights = std::vector<Weights>;

// Converts a flat list of views, or of what is derived from View. Throws std::invalid_argument where
// the list has too few or too many weights.
template <class V>
AllWeights all_weights(const Description& stack, const std::vector<V>& flat) {
  if (flat.size() != stack.weights())
    throw std::invalid_argument("the stack has " + std::to_string(stack.weights()) + " weights; got " +
                                std::to_string(flat.size()));
  const std::size_t count = stack.weights_per_direction();
  const View none("");
  AllWeights weights;
  weights.reserve(flat.size() / count);
  for (std::size_t k = 0; k < flat.size(); k += count) {
    const View &b_ih = stack.bias ? flat[k + 2] : none, &b_hh = stack.bias ? flat[k + 3] : none;
    const View& w_hr = stack.projected ? flat[k + count - 1] : none;
    weights.push_back({flat[k], flat[k + 1], b_ih, b_hh, w_hr});
  }
  return weights;
}

// The state of direction `number`, counted over all layers.
template <class T>
Matrix<T> state(const View& view, int number) {
  if (!view) return {};
  T* data = static_cast<T*>(view.data());
  return view.dims() == 2 ? Matrix<T>{data, view.stride(0)}
                          : Matrix<T>{data + number * view.stride(0), view.stride(1)};
}

// The tensors that forward and backward both read, and the sizes that all other tensors must have. The
// caller calls the functions check_... in the order in which they stand here.
struct Call {
  // The views have the names of their fields.
  struct Tensors {
    View x, h0, c0;
    AllWeights weights;
    View sizes, reset;
  };

  Call(const Description& description, Tensors tensors)
      : stack(description),
        info(cell_info(stack.cell)),
        all_directions(stack.layers * stack.directions),
        x(std::move(tensors.x)),
        h0(std::move(tensors.h0)),
        c0(std::move(tensors.c0)),
        weights(std::move(tensors.weights)),
        sizes(std::move(tensors.sizes)),
        reset(std::move(tensors.reset)) {}

  void check_input() {
    require(x);
    is_packed = sizes && x.dims() == 2;
    is_step = x.dims() == 2 && !sizes && all_directions == 1;
    if (x.dims() != (is_packed || is_step ? 2 : 3))
      throw std::invalid_argument("x has shape " + x.shape_text() + "; expected " +
                                  (stack.batch_first ? "(B, T, I)" : "(T, B, I)"));
    if (is_packed) lengths[0] = RowLengths::of_batch_sizes(sizes);
    const int time = stack.batch_first ? 1 : 0;
    steps = is_packed ? lengths[0].steps() : is_step ? 1 : x.size(time);
    batch = is_packed ? lengths[0].batch() : is_step ? x.size(0) : x.size(1 - time);
    rows = is_packed ? lengths[0].rows() : steps * batch;
    inputs = x.size(x.dims() - 1);
    if (steps < 1) throw std::invalid_argument("x has no steps");
    if (sizes && !is_packed) lengths[0] = RowLengths::of_lengths(sizes, batch, steps);
    longest = sizes ? lengths[0].steps() : steps;
    if (sizes && stack.directions == 2) lengths[1] = lengths[0].reversed();
    if (sizes && stack.reverse) lengths[0] = lengths[0].reversed();
    check_sequence(Checker(x), x, inputs);
    check_reset();
  }

  // `reset` has one bool for every row of x.
  void check_reset() const {
    if (!reset) return;
    if (reset.dtype() != Dtype::boolean)
      throw WrongType("reset has dtype " + reset.dtype_name() + "; expected bool");
    const int dims = x.dims() - 1;
    bool same = reset.dims() == dims;
    for (int dim = 0; same && dim < dims; ++dim) same = reset.size(dim) == x.size(dim);
    if (!same)
      throw std::invalid_argument("reset has shape " + reset.shape_text() +
                                  "; expected that of x without its features, and x has " +
                                  x.shape_text());
  }

  // Whether the call is worth releasing the GIL: it takes more than about ten microseconds. To take the
  // GIL again costs a microsecond, or up to five milliseconds where another Python thread runs.
  bool is_long() const {
    const double cost_of_steps = 2048.0 * steps * all_directions;
    return cost_of_steps +
               1.0 * rows * all_directions * info.weight_blocks * hidden * (inputs + outputs) >
           1 << 18;
  }

  // Whether all weights have the dtype of x and contiguous rows.
  bool has_usable_weights() const {
    return std::all_of(weights.begin(), weights.end(), [&](const auto& w) {
      return w.all([&](const View& view) {
        return !view || (view.dtype() == x.dtype() && view.has_contiguous_rows());
      });
    });
  }

  void check_weights() {
    for (const Weights& w : weights) {
      require(w.w_ih);
      require(w.w_hh);
      if (stack.projected) require(w.w_hr);
    }
    const Weights& w = weights[0];
    if (w.w_hh.dims() != 2)
      throw std::invalid_argument("w_hh has shape " + w.w_hh.shape_text() + "; expected (G * H, " +
                                  (stack.projected ? "R)" : "H)"));
    if (w.w_hr && w.w_hr.dims() != 2)
      throw std::invalid_argument("w_hr has shape " + w.w_hr.shape_text() + "; expected (R, H)");
    outputs = w.w_hh.size(1);
    hidden = w.w_hr ? w.w_hr.size(1) : outputs;
    width = stack.directions * outputs;
    if (outputs < 1) throw std::invalid_argument("w_hh has no columns");
    if (hidden < 1) throw std::invalid_argument("w_hr has no columns");
    check_weights(Checker(x), weights);
  }

  void check_states() const { check_states(Checker(x), h0, c0); }

  void check_sequence(const Checker& check, const View& view, index features) const {
    if (is_packed || is_step)
      check.shape(view, {rows, features});
    else if (stack.batch_first)
      check.shape(view, {batch, steps, features});
    else
      check.shape(view, {steps, batch, features});
  }

  void check_states(const Checker& check, const View& h, const View& c) const {
    const auto shape = [&](const View& view, index features) {
      if (is_step || stack.single)
        check.shape(view, {batch, features});
      else
        check.shape(view, {all_directions, batch, features});
    };
    shape(h, outputs);
    shape(c, hidden);
    if (c && !info.cell_state)
      throw std::invalid_argument(std::string("the cell ") + info.name + " has no cell state c");
  }

  void check_cell_states(const Checker& check, const View& cell_states) const {
    check_sequence(check, cell_states, stack.directions * hidden);
    if (cell_states && !info.cell_state)
      throw std::invalid_argument(std::string("the cell ") + info.name + " has no cell states");
  }

  void check_weights(const Checker& check, const AllWeights& views) const {
    const index gates = info.weight_blocks * hidden;
    for (int number = 0; number < all_directions; ++number) {
      const Weights& w = views[static_cast<std::size_t>(number)];
      check.shape(w.w_ih, {gates, number < stack.directions ? inputs : width});
      check.shape(w.w_hh, {gates, outputs});
      check.shape(w.b_ih, {gates});
      check.shape(w.b_hh, {gates});
      check.shape(w.w_hr, {outputs, hidden});
    }
  }

  // `saved` holds Layer::saved of every direction of every layer, then the outputs of all layers but
  // the last.
  template <class T>
  Real<T>* saved_of(const View& saved, int number) const {
    return static_cast<Real<T>*>(saved.data()) + number * saved_part<T>();
  }
  template <class T>
  T* saved_output(const View& saved, int layer) const {
    return reinterpret_cast<T*>(saved_of<T>(saved, all_directions)) + layer * rows * width;
  }
  template <class T>
  index saved_part() const {
    return rows * kernels().of<T>().cells[stack.cell].saved_row(hidden);
  }
  index saved_bytes() const {
    return with_numbers(x.dtype(), [&](auto number) {
      using T = decltype(number);
      return all_directions * saved_part<T>() * index{sizeof(Real<T>)} +
             (stack.layers - 1) * rows * width * index{sizeof(T)};
    });
  }

  // The sequence in a user's tensor.
  template <class T>
  Sequence<T> sequence(const View& view) const {
    if (!view) return {};
    T* data = static_cast<T*>(view.data());
    if (is_packed || is_step) return {data, 0, view.stride(0)};
    return stack.batch_first ? Sequence<T>{data, view.stride(1), view.stride(0)}
                             : Sequence<T>{data, view.stride(0), view.stride(1)};
  }
  // The sequence in memory without gaps.
  template <class T>
  Sequence<T> dense(T* data, index features) const {
    return {data, is_packed ? 0 : batch * features, features};
  }

  bool reverses(int direction) const { return stack.reverse || direction == 1; }

  // A sequence in the order of processing of a direction.
  template <class T>
  Sequence<T> directed(Sequence<T> sequence, int direction) const {
    if (!sequence.data || is_packed || !reverses(direction)) return sequence;
    return {sequence.data + (longest - 1) * sequence.step, -sequence.step, sequence.row};
  }
  // The features of one direction, from a sequence with the outputs of both directions side by side.
  template <class T>
  Sequence<T> direction_part(Sequence<T> y, int direction) const {
    if (y.data) y.data += direction * outputs;
    return directed(y, direction);
  }

  // The resets in the order of processing of a direction: a reset comes before its step in that order.
  Resets resets(int direction) const {
    const auto* data = static_cast<const std::uint8_t*>(reset.data());
    if (!data) return {};
    if (is_packed || is_step) return {data, 0, reset.stride(0)};
    const Sequence<const std::uint8_t> flags{data, reset.stride(stack.batch_first ? 1 : 0),
                                             reset.stride(stack.batch_first ? 0 : 1)};
    const auto [begin, step, row] = directed(flags, direction);
    return {begin, step, row};
  }

  // The part of one direction of the cell states of layer k: null for all layers but the last.
  template <class T>
  Sequence<T> cell_states_of(const View& cell_states, int k, int direction) const {
    Sequence<T> states = k == stack.layers - 1 ? sequence<T>(cell_states) : Sequence<T>{};
    if (states.data) states.data += direction * hidden;
    return directed(states, direction);
  }

  // All but x and y, which the caller sets.
  template <class T>
  Layer<T> layer(int k, int direction, const View& cell_states, const View& h_n, const View& c_n,
                 Real<T>* saved, T* panels) const {
    const int number = k * stack.directions + direction;
    const Weights& w = weights[static_cast<std::size_t>(number)];
    return {longest,
            batch,
            k == 0 ? inputs : width,
            hidden,
            outputs,
            lengths[direction].ragged(),
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
            panels,
            sizeof(T) == sizeof(float) ? float32_parts(stack.precision, hidden) : 0};
  }

  const Description& stack;
  const CellInfo& info;
  const int all_directions;  // of all layers: layers * directions
  bool is_packed = false, is_step = false;
  RowLengths lengths[2];  // by direction
  const View x, h0, c0;
  const AllWeights weights;
  const View sizes, reset;
  index steps = 0, batch = 0, rows = 0, inputs = 0, hidden = 0, outputs = 0;
  index longest = 0;  // the steps of the longest row
  index width = 0;    // of a layer's output
};

}  // namespace rnnfast

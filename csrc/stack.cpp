#include "stack.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/run.h"
#include "views.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

// The steps of a packed sequence, in the order of processing; see Steps.
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

  Steps steps() const {
    return count.empty() ? Steps{} : Steps{first.data(), count.data(), before.data()};
  }

  std::vector<index> first, count, before;
  index batch = 0, rows = 0;
};

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

bool is_one_of(py::handle object, py::handle types) {
  const auto tuple = py::reinterpret_borrow<py::tuple>(types);
  return std::any_of(tuple.begin(), tuple.end(), [&](py::handle type) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr();
  });
}

// The state of one layer and direction.
template <class T>
Matrix<T> state(const View& view, int number) {
  if (!view) return {};
  T* data = static_cast<T*>(view.data());
  return view.dims() == 2 ? Matrix<T>{data, view.stride(0)}
                          : Matrix<T>{data + number * view.stride(0), view.stride(1)};
}

}  // namespace

// The tensors that forward and backward both read, and the sizes that all others must have. To be
// checked in the order of the functions here.
struct Call {
  Call(const Stack& stack, py::handle batch_sizes, py::handle input, py::handle h, py::handle c,
       const py::list& list)
      : s(stack),
        info(cell_info(s.cell_)),
        numbers(s.layers_ * s.directions_),
        is_packed(!batch_sizes.is_none()),
        packing{{View(batch_sizes, "batch_sizes", false), s.reverse_},
                {View(batch_sizes, "batch_sizes", false), true}},
        x(input, "x", false),
        h0(h, "h0", false),
        c0(c, "c0", false),
        weights(read(list, false)) {}

  void check_input() {
    require(x);
    is_step = x.dims() == 2 && !is_packed && numbers == 1;
    if (x.dims() != (is_packed || is_step ? 2 : 3))
      throw py::value_error("x has shape " + x.shape_text() + "; expected " +
                            (is_packed        ? "(sum of batch_sizes, I)"
                             : s.batch_first_ ? "(B, T, I)"
                                              : "(T, B, I)"));
    const int time = s.batch_first_ ? 1 : 0;
    steps = is_packed ? static_cast<index>(packing[0].count.size()) : is_step ? 1 : x.size(time);
    batch = is_packed ? packing[0].batch : is_step ? x.size(0) : x.size(1 - time);
    rows = is_packed ? packing[0].rows : steps * batch;
    inputs = x.size(x.dims() - 1);
    if (steps < 1) throw py::value_error("x has no steps");
    check_sequence(Checker(x), x, inputs);
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
      if (s.projected_) require(each->w_hr);
    }
    const Weights& w = *weights[0];
    if (w.w_hh.dims() != 2)
      throw py::value_error("w_hh has shape " + w.w_hh.shape_text() + "; expected (G * H, " +
                            (s.projected_ ? "R)" : "H)"));
    if (w.w_hr && w.w_hr.dims() != 2)
      throw py::value_error("w_hr has shape " + w.w_hr.shape_text() + "; expected (R, H)");
    outputs = w.w_hh.size(1);
    hidden = w.w_hr ? w.w_hr.size(1) : outputs;
    width = s.directions_ * outputs;
    if (outputs < 1) throw py::value_error("w_hh has no columns");
    if (hidden < 1) throw py::value_error("w_hr has no columns");
    check_weights(Checker(x), weights);
  }

  void check_states() const { check_states(Checker(x), h0, c0); }

  AllWeights read(const py::list& list, bool gradients) const {
    const std::size_t each = (s.bias_ ? 4u : 2u) + (s.projected_ ? 1u : 0u);
    if (list.size() != each * static_cast<std::size_t>(numbers))
      throw py::value_error("the stack has " + std::to_string(each * static_cast<unsigned>(numbers)) +
                            " weights; got " + std::to_string(list.size()));
    AllWeights all;
    for (std::size_t at = 0; at < list.size(); at += each)
      all.push_back(std::make_unique<Weights>(list, at, s.bias_, s.projected_, gradients));
    return all;
  }

  void check_sequence(const Checker& check, const View& view, index features) const {
    if (is_packed || is_step)
      check.shape(view, {rows, features});
    else if (s.batch_first_)
      check.shape(view, {batch, steps, features});
    else
      check.shape(view, {steps, batch, features});
  }

  void check_states(const Checker& check, const View& h, const View& c) const {
    const auto shape = [&](const View& view, index features) {
      if (is_step || s.single_)
        check.shape(view, {batch, features});
      else
        check.shape(view, {numbers, batch, features});
    };
    shape(h, outputs);
    shape(c, hidden);
    if (c && !info.cell_state)
      throw py::value_error(std::string("the cell ") + info.name + " has no cell state c");
  }

  void check_weights(const Checker& check, const AllWeights& all) const {
    const index gates = info.weight_blocks * hidden;
    for (int number = 0; number < numbers; ++number) {
      const Weights& w = *all[static_cast<std::size_t>(number)];
      check.shape(w.w_ih, {gates, number < s.directions_ ? inputs : width});
      check.shape(w.w_hh, {gates, outputs});
      check.shape(w.b_ih, {gates});
      check.shape(w.b_hh, {gates});
      check.shape(w.w_hr, {outputs, hidden});
    }
  }

  // Layer::saved of every direction of every layer, then the outputs of all layers but the last.
  template <class T>
  T* saved_of(const View& saved, int number) const {
    return static_cast<T*>(saved.data()) + number * saved_part();
  }
  template <class T>
  T* saved_output(const View& saved, int layer) const {
    return static_cast<T*>(saved.data()) + numbers * saved_part() + layer * rows * width;
  }
  index saved_part() const {
    const bool float64 = x.dtype() == Dtype::float64;
    return rows * (float64 ? kernels().of<double>(s.cell_).saved_row(hidden)
                           : kernels().of<float>(s.cell_).saved_row(hidden));
  }
  index saved_size() const { return numbers * saved_part() + (s.layers_ - 1) * rows * width; }

  // A sequence as a user's tensor has it, or one of `features` numbers a row without gaps.
  template <class T>
  Sequence<T> sequence(const View& view) const {
    if (!view) return {};
    T* data = static_cast<T*>(view.data());
    if (is_packed || is_step) return {data, 0, view.stride(0)};
    return s.batch_first_ ? Sequence<T>{data, view.stride(1), view.stride(0)}
                          : Sequence<T>{data, view.stride(0), view.stride(1)};
  }
  template <class T>
  Sequence<T> dense(T* data, index features) const {
    return {data, is_packed ? 0 : batch * features, features};
  }

  bool reverses(int direction) const { return s.reverse_ || direction == 1; }

  // What a direction sees of a sequence, in its order of processing.
  template <class T>
  Sequence<T> directed(Sequence<T> of, int direction) const {
    if (!of.data || is_packed || !reverses(direction)) return of;
    return {of.data + (steps - 1) * of.step, -of.step, of.row};
  }
  // The same of one that has the features of both directions side by side.
  template <class T>
  Sequence<T> own(Sequence<T> of, int direction) const {
    if (of.data) of.data += direction * outputs;
    return directed(of, direction);
  }

  template <class T>
  Layer<T> layer(int k, int direction, Sequence<const T> input, Sequence<T> y, const View& h_n,
                 const View& c_n, T* saved) const {
    const int number = k * s.directions_ + direction;
    const Weights& w = *weights[static_cast<std::size_t>(number)];
    return {steps,
            batch,
            k == 0 ? inputs : width,
            hidden,
            outputs,
            packing[direction].steps(),
            directed(input, direction),
            state<const T>(h0, number),
            state<const T>(c0, number),
            matrix<const T>(w.w_ih),
            matrix<const T>(w.w_hh),
            vector<const T>(w.b_ih),
            vector<const T>(w.b_hh),
            matrix<const T>(w.w_hr),
            own(y, direction),
            state<T>(h_n, number),
            state<T>(c_n, number),
            saved};
  }

  const Stack& s;
  const CellInfo& info;
  const int numbers;  // layers times directions
  bool is_packed, is_step = false;
  const Packing packing[2];  // by direction
  const View x, h0, c0;
  const AllWeights weights;
  index steps, batch, rows, inputs, hidden, outputs, width;  // width: of a layer's output
};

namespace {

struct Outputs {
  Outputs(const Call& call, py::handle of_y, py::handle of_h, py::handle of_c, py::handle of_saved)
      : y(of_y, "y", true),
        h_n(of_h, "h_n", true),
        c_n(of_c, "c_n", true),
        saved(of_saved, "saved", true) {
    require(y);
    const Checker check(call.x);
    call.check_sequence(check, y, call.width);
    call.check_states(check, h_n, c_n);
    check.shape(saved, {call.saved_size()});
  }
  View y, h_n, c_n, saved;
};

template <class T>
void run(const Call& call, int cell, int layers, int directions, const Outputs& out, int threads) {
  std::optional<Memory> between[2];  // outputs of layers that only the next one reads
  Sequence<const T> x = call.sequence<const T>(call.x);
  for (int k = 0; k < layers; ++k) {
    Sequence<T> y = call.sequence<T>(out.y);
    if (k < layers - 1 && out.saved) {
      y = call.dense(call.saved_output<T>(out.saved, k), call.width);
    } else if (k < layers - 1) {
      if (k < 2) between[k].emplace(static_cast<std::size_t>(call.rows * call.width) * sizeof(T));
      y = call.dense(static_cast<T*>(between[k % 2]->data()), call.width);
    }
    Layer<T> jobs[2];
    for (int d = 0; d < directions; ++d)
      jobs[d] = call.layer<T>(k, d, x, y, out.h_n, out.c_n,
                              out.saved ? call.saved_of<T>(out.saved, k * directions + d) : nullptr);
    run_forward(cell, jobs, directions, threads);
    x = {y.data, y.step, y.row};
  }
}

struct GradientViews {
  GradientViews(const Call& call, py::handle of_dy, py::handle of_dh_n, py::handle of_dc_n,
                py::handle of_dx, py::handle of_dh0, py::handle of_dc0, const py::list& list)
      : dy(of_dy, "dy", false),
        dh_n(of_dh_n, "dh_n", false),
        dc_n(of_dc_n, "dc_n", false),
        dx(of_dx, "dx", true),
        dh0(of_dh0, "dh0", true),
        dc0(of_dc0, "dc0", true),
        weights(call.read(list, true)) {
    const Checker check(call.x);
    call.check_sequence(check, dy, call.width);
    call.check_sequence(check, dx, call.inputs);
    call.check_states(check, dh_n, dc_n);
    call.check_states(check, dh0, dc0);
    call.check_weights(check, weights);
  }

  View dy, dh_n, dc_n, dx, dh0, dc0;
  AllWeights weights;
};

template <class T>
void run_back(const Call& call, int cell, int layers, int directions, const View& y, const View& saved,
              const GradientViews& grads, int threads) {
  const auto of = [&](int k, int d) -> const Weights& {
    return *grads.weights[static_cast<std::size_t>(k * directions + d)];
  };
  int lowest = 0;  // below it nothing is wanted
  if (!grads.dx && !grads.dh0 && !grads.dc0)
    while (lowest < layers && !of(lowest, 0).any() && !of(lowest, directions - 1).any()) ++lowest;
  const auto output = [&](int k) {
    return k == layers - 1 ? call.sequence<T>(y)
                           : call.dense(call.saved_output<T>(saved, k), call.width);
  };
  const View none(Py_None, "", false);
  std::optional<Memory> between[2];  // gradients of the outputs of layers below the last
  Sequence<const T> dy = call.sequence<const T>(grads.dy);
  for (int k = layers - 1; k >= lowest; --k) {
    Sequence<const T> x = call.sequence<const T>(call.x);
    Sequence<T> dx = call.sequence<T>(grads.dx);
    if (k > 0) {
      const Sequence<T> below = output(k - 1);
      x = {below.data, below.step, below.row};
      dx = {};
    }
    if (k > lowest) {
      std::optional<Memory>& memory = between[k % 2];
      if (!memory) memory.emplace(static_cast<std::size_t>(call.rows * call.width) * sizeof(T));
      dx = call.dense(static_cast<T*>(memory->data()), call.width);
    }
    Layer<T> jobs[2];
    Gradients<T> wanted[2];
    for (int d = 0; d < directions; ++d) {
      const int number = k * directions + d;
      const Weights& w = of(k, d);
      jobs[d] = call.layer<T>(k, d, x, output(k), none, none, call.saved_of<T>(saved, number));
      wanted[d] = {call.own(dy, d),
                   state<const T>(grads.dh_n, number),
                   state<const T>(grads.dc_n, number),
                   call.directed(dx, d),
                   false,
                   state<T>(grads.dh0, number),
                   state<T>(grads.dc0, number),
                   matrix<T>(w.w_ih),
                   matrix<T>(w.w_hh),
                   vector<T>(w.b_ih),
                   vector<T>(w.b_hh),
                   matrix<T>(w.w_hr)};
    }
    run_backward(cell, jobs, wanted, directions, threads);
    dy = {dx.data, dx.step, dx.row};
  }
}

}  // namespace

Stack::Stack(int cell, int layers, int directions, bool single, bool reverse, bool bias, bool projected,
             bool batch_first)
    : cell_(cell),
      layers_(layers),
      directions_(directions),
      single_(single),
      reverse_(reverse),
      bias_(bias),
      projected_(projected),
      batch_first_(batch_first) {
  const CellInfo& info = cell_info(cell);
  if (layers < 1 || layers > 1 << 20)
    throw py::value_error("layers is " + std::to_string(layers) + "; expected at least 1");
  if (directions < 1 || directions > 2)
    throw py::value_error("directions is " + std::to_string(directions) + "; expected 1 or 2");
  if ((single && layers * directions > 1) || (reverse && directions > 1))
    throw py::value_error(
        "a stack of several layers or directions is not single, one of two directions not reversed");
  if (projected && !info.projects)
    throw py::value_error(std::string("the cell ") + info.name + " has no projection w_hr");
}

bool Stack::forward(py::handle types, int threads, py::handle batch_sizes, py::handle x, py::handle h0,
                    py::handle c0, const py::list& weights, py::handle y, py::handle h_n,
                    py::handle c_n, py::handle saved) const {
  // Whether `check` succeeds; where there are no types it throws if it does not.
  const auto passes = [&](auto check) {
    try {
      check();
      return true;
    } catch (const py::builtin_exception&) {
      if (types.is_none()) throw;
    } catch (py::error_already_set&) {  // no strided memory: sparse, meta, nested
      if (types.is_none()) throw;
    }
    return false;
  };
  if (!types.is_none()) {
    for (py::handle object : {x, h0, c0})
      if (!object.is_none() && !is_one_of(object, types)) return false;
    for (py::handle object : weights)
      if (!is_one_of(object, types)) return false;
  }
  std::optional<Call> call;
  const bool readable = passes([&] {
    call.emplace(*this, batch_sizes, x, h0, c0, weights);
    call->check_input();
  });
  if (!readable || (!types.is_none() && !call->has_like_weights())) return false;
  call->check_weights();
  if (!passes([&] { call->check_states(); })) return false;
  const Outputs out(*call, y, h_n, c_n, saved);
  const py::gil_scoped_release release;
  if (call->x.dtype() == Dtype::float32)
    run<float>(*call, cell_, layers_, directions_, out, threads);
  else
    run<double>(*call, cell_, layers_, directions_, out, threads);
  return true;
}

void Stack::backward(int threads, py::handle batch_sizes, py::handle x, py::handle h0, py::handle c0,
                     const py::list& weights, py::handle y, py::handle saved, py::handle dy,
                     py::handle dh_n, py::handle dc_n, py::handle dx, py::handle dh0, py::handle dc0,
                     const py::list& dweights) const {
  Call call(*this, batch_sizes, x, h0, c0, weights);
  call.check_input();
  call.check_weights();
  call.check_states();
  const Outputs left(call, y, Py_None, Py_None, saved);
  require(left.saved);
  const GradientViews grads(call, dy, dh_n, dc_n, dx, dh0, dc0, dweights);
  const py::gil_scoped_release release;
  if (call.x.dtype() == Dtype::float32)
    run_back<float>(call, cell_, layers_, directions_, left.y, left.saved, grads, threads);
  else
    run_back<double>(call, cell_, layers_, directions_, left.y, left.saved, grads, threads);
}

std::unique_ptr<Memory> Stack::new_saved(bool float64, index rows, index hidden, index outputs) const {
  constexpr index most = index{1} << 40;
  index numbers = 0, part, between, bytes;
  if (rows < 0 || hidden < 1 || hidden > most || outputs < 1 || outputs > most)
    throw py::value_error("new_saved: an argument is out of range");
  const index row = float64 ? kernels().of<double>(cell_).saved_row(hidden)
                            : kernels().of<float>(cell_).saved_row(hidden);
  if (__builtin_mul_overflow(rows, row, &part) ||
      __builtin_mul_overflow(part, index{layers_} * directions_, &part) ||
      __builtin_mul_overflow(rows, outputs * directions_, &between) ||
      __builtin_mul_overflow(between, index{layers_} - 1, &between) ||
      __builtin_add_overflow(part, between, &numbers) ||
      __builtin_mul_overflow(numbers, index{float64 ? 8 : 4}, &bytes))
    throw py::value_error("new_saved: an argument is out of range");
  return std::make_unique<Memory>(static_cast<std::size_t>(bytes));
}

}  // namespace rnnfast

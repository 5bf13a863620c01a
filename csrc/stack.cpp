#include "stack.h"

#include <memory>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/run.h"
#include "views.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

struct Shape {
  int cell, layers, directions;
  bool batch_first, step;  // step: tensors have no time dimension
  index steps, batch, inputs, hidden, outputs;
};

struct InputViews {
  InputViews(py::handle input, py::handle h, py::handle c)
      : x(input, "x", false), h0(h, "h0", false), c0(c, "c0", false) {}
  View x, h0, c0;
};

struct DirectionViews {
  DirectionViews(const py::list& weights, std::size_t first, bool bias, bool projected)
      : w_ih(weights[first], "w_ih", false),
        w_hh(weights[first + 1], "w_hh", false),
        b_ih(bias ? py::handle(weights[first + 2]) : py::handle(Py_None), "b_ih", false),
        b_hh(bias ? py::handle(weights[first + 3]) : py::handle(Py_None), "b_hh", false),
        w_hr(projected ? py::handle(weights[first + (bias ? 4 : 2)]) : py::handle(Py_None), "w_hr",
             false) {}
  View w_ih, w_hh, b_ih, b_hh, w_hr;
};

struct OutputViews {
  OutputViews(py::handle output, py::handle h, py::handle c)
      : y(output, "y", true), h_n(h, "h_n", true), c_n(c, "c_n", true) {}
  View y, h_n, c_n;
};

bool is_one_of(py::handle object, const py::tuple& types) {
  if (object.is_none()) return true;
  for (py::handle type : types)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr()) return true;
  return false;
}

bool is_state(const View& view, const View& x, const Shape& n, index width) {
  if (!view) return true;
  const int dims = n.step ? 2 : 3;
  return view.dtype() == x.dtype() && view.dims() == dims && view.has_contiguous_rows() &&
         (n.step || view.size(0) == n.layers * n.directions) && view.size(dims - 2) == n.batch &&
         view.size(dims - 1) == width;
}

// The state of one layer and direction in [layers * directions, B, width].
template <class T>
Matrix<T> state(const View& view, int number) {
  if (!view) return {};
  const bool step = view.dims() == 2;
  T* data = static_cast<T*>(view.data());
  return step ? Matrix<T>{data, view.stride(0)}
              : Matrix<T>{data + number * view.stride(0), view.stride(1)};
}

template <class T>
Sequence<T> time_major(const View& view, const Shape& n) {
  T* data = static_cast<T*>(view.data());
  if (n.step) return {data, 0, view.stride(0)};
  return n.batch_first ? Sequence<T>{data, view.stride(1), view.stride(0)}
                       : Sequence<T>{data, view.stride(0), view.stride(1)};
}

// The part of a sequence that one direction sees, in its order of processing.
template <class T>
Sequence<T> directed(Sequence<T> s, index steps, bool reverse) {
  return reverse ? Sequence<T>{s.data + (steps - 1) * s.step, -s.step, s.row} : s;
}

template <class T>
void run(const Shape& n, int threads, const InputViews& in,
         const std::vector<std::unique_ptr<DirectionViews>>& weights, const OutputViews& out) {
  const index width = n.directions * n.outputs;
  std::vector<T> between[2];  // outputs of layers that another reads
  for (int k = 0; k < 2 && k < n.layers - 1; ++k)
    between[k].resize(static_cast<std::size_t>(n.steps * n.batch * width));
  Sequence<const T> x = time_major<const T>(in.x, n);
  index inputs = n.inputs;
  for (int k = 0; k < n.layers; ++k) {
    const Sequence<T> y = k == n.layers - 1
                              ? time_major<T>(out.y, n)
                              : Sequence<T>{between[k % 2].data(), n.batch * width, width};
    for (int d = 0; d < n.directions; ++d) {
      const int number = k * n.directions + d;
      const DirectionViews& w = *weights[static_cast<std::size_t>(number)];
      const Sequence<T> own{y.data + d * n.outputs, y.step, y.row};
      run_forward(n.cell,
                  Layer<T>{n.steps,
                           n.batch,
                           inputs,
                           n.hidden,
                           n.outputs,
                           {},
                           directed(x, n.steps, d == 1),
                           state<const T>(in.h0, number),
                           state<const T>(in.c0, number),
                           matrix<const T>(w.w_ih),
                           matrix<const T>(w.w_hh),
                           vector<const T>(w.b_ih),
                           vector<const T>(w.b_hh),
                           matrix<const T>(w.w_hr),
                           directed(own, n.steps, d == 1),
                           state<T>(out.h_n, number),
                           state<T>(out.c_n, number),
                           nullptr},
                  threads);
    }
    x = {y.data, y.step, y.row};
    inputs = width;
  }
}

}  // namespace

bool infer(const py::tuple& types, int cell, int layers, int directions, bool bias, bool projected,
           bool batch_first, int threads, py::handle x, py::handle h0, py::handle c0,
           const py::list& weights, py::handle y, py::handle h_n, py::handle c_n) {
  const std::size_t each = (bias ? 4u : 2u) + (projected ? 1u : 0u), count = weights.size();
  const CellInfo& info = cell_info(cell);
  if (layers < 1 || directions < 1 || directions > 2 || count % (each * directions) != 0 ||
      count / (each * directions) != static_cast<std::size_t>(layers) || (projected && !info.projects))
    throw py::value_error("infer: the module's description does not fit its weights");
  for (py::handle object : {x, h0, c0})
    if (!is_one_of(object, types)) return false;
  for (py::handle object : weights)
    if (object.is_none() || !is_one_of(object, types)) return false;
  std::optional<InputViews> in;
  std::vector<std::unique_ptr<DirectionViews>> views;
  try {
    in.emplace(x, h0, c0);
    for (std::size_t k = 0; k < count; k += each)
      views.push_back(std::make_unique<DirectionViews>(weights, k, bias, projected));
  } catch (const py::value_error&) {  // another device, too many dimensions
    return false;
  } catch (py::error_already_set&) {  // no strided memory: sparse, meta, nested
    return false;
  }
  const View& input = in->x;
  if (!input || (input.dims() != 2 && input.dims() != 3) || !input.has_contiguous_rows() ||
      (input.dtype() != Dtype::float32 && input.dtype() != Dtype::float64))
    return false;
  for (const auto& w : views)
    for (const View* view : {&w->w_ih, &w->w_hh, &w->b_ih, &w->b_hh, &w->w_hr})
      if (*view && (view->dtype() != input.dtype() || !view->has_contiguous_rows())) return false;
  const View &w_hh = views[0]->w_hh, &w_hr = views[0]->w_hr;
  if (w_hh.dims() != 2 || (w_hr && w_hr.dims() != 2)) return false;

  const bool step = input.dims() == 2;
  if (step && layers * directions != 1) return false;
  const index outputs = w_hh.size(1), hidden = w_hr ? w_hr.size(1) : outputs;
  Shape n{cell, layers, directions, batch_first, step, 1, input.size(0), 0, hidden, outputs};
  n.inputs = input.size(input.dims() - 1);
  if (!step) {
    n.steps = input.size(batch_first ? 1 : 0);
    n.batch = input.size(batch_first ? 0 : 1);
  }
  if (n.steps < 1 || n.hidden < 1 || n.outputs < 1 || !is_state(in->h0, input, n, n.outputs) ||
      !is_state(in->c0, input, n, n.hidden) || (in->c0 && !info.cell_state))
    return false;

  const Checker check(input);
  const index gates = info.weight_blocks * n.hidden, width = directions * n.outputs;
  for (int k = 0; k < layers * directions; ++k) {
    const DirectionViews& w = *views[static_cast<std::size_t>(k)];
    check.shape(w.w_ih, {gates, k < directions ? n.inputs : width});
    check.shape(w.w_hh, {gates, n.outputs});
    check.shape(w.b_ih, {gates});
    check.shape(w.b_hh, {gates});
    check.shape(w.w_hr, {n.outputs, n.hidden});
  }
  const OutputViews out(y, h_n, c_n);
  require(out.y);
  if (step) {
    for (const View* view : {&out.y, &out.h_n}) check.shape(*view, {n.batch, n.outputs});
    check.shape(out.c_n, {n.batch, n.hidden});
  } else {
    const index first = batch_first ? n.batch : n.steps, second = batch_first ? n.steps : n.batch;
    check.shape(out.y, {first, second, width});
    check.shape(out.h_n, {layers * directions, n.batch, n.outputs});
    check.shape(out.c_n, {layers * directions, n.batch, n.hidden});
  }
  if (out.c_n && !info.cell_state)
    throw py::value_error(std::string("the cell ") + info.name + " has no cell state c");

  const py::gil_scoped_release release;
  if (input.dtype() == Dtype::float32)
    run<float>(n, threads, *in, views, out);
  else
    run<double>(n, threads, *in, views, out);
  return true;
}

}  // namespace rnnfast

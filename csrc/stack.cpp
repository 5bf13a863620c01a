#include "stack.h"

#include <algorithm>
#include <map>
#include <optional>

#include "call.h"
#include "cpu/run.h"
#include "padding.h"

namespace rnnfast {
namespace {

// Methods of torch.Tensor; to find them costs half as much as to run them.
struct Methods {
  explicit Methods(const py::tuple& types)
      : is_neg(py::object(types[0].attr("is_neg")).release().ptr()),
        new_empty(py::object(types[0].attr("new_empty")).release().ptr()) {}
  static const Methods& of(const py::tuple& types) {
    static const Methods methods(types);
    return methods;
  }
  PyObject *const is_neg, *const new_empty;
};

py::object called(PyObject* function, PyObject* const* arguments, std::size_t count) {
  PyObject* result = PyObject_Vectorcall(function, arguments, count, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Whether a tensor is of one of these exact types, and its memory does not hold the negatives of its
// values, as the imaginary part of a conjugate does. (Zeros without memory have no address to read.)
bool is_plain(py::handle object, const py::tuple& types) {
  const auto is_type = [&](py::handle type) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr();
  };
  PyObject* const argument = object.ptr();
  return std::any_of(types.begin(), types.end(), is_type) &&
         called(Methods::of(types).is_neg, &argument, 1).ptr() != Py_True;
}

bool is_list_or_tuple(py::handle object) {
  return PyTuple_CheckExact(object.ptr()) || PyList_CheckExact(object.ptr());
}

// Like x in all but shape, uninitialised.
py::object new_like(const Methods& methods, py::handle x, std::initializer_list<index> shape) {
  py::object sizes[3];
  PyObject* arguments[4] = {x.ptr()};
  std::size_t count = 0;
  for (index size : shape) {
    sizes[count] = py::int_(size);
    arguments[count + 1] = sizes[count].ptr();
    ++count;
  }
  return called(methods.new_empty, arguments, count + 1);
}

py::object new_sequence(const Methods& methods, const Call& call, py::handle x, index features) {
  if (call.is_packed || call.is_step) return new_like(methods, x, {call.rows, features});
  return call.s.batch_first ? new_like(methods, x, {call.batch, call.steps, features})
                            : new_like(methods, x, {call.steps, call.batch, features});
}

py::object new_states(const Methods& methods, const Call& call, py::handle x, index features) {
  return call.is_step ? new_like(methods, x, {call.batch, features})
                      : new_like(methods, x, {call.numbers, call.batch, features});
}

struct Outputs {
  Outputs(const Call& call, const Written& written)
      : y(written.y, "y", true),
        h_n(written.h_n, "h_n", true),
        c_n(written.c_n, "c_n", true),
        cell_states(written.cell_states, "cell_states", true),
        saved(written.saved, "saved", true) {
    require(y);
    const Checker check(call.x);
    call.check_sequence(check, y, call.width);
    call.check_states(check, h_n, c_n);
    call.check_cell_states(check, cell_states);
    if (saved && (saved.dtype() != Dtype::uint8 || saved.dims() != 1 ||
                  saved.size(0) != call.saved_bytes() || !saved.has_contiguous_rows()))
      throw py::value_error("saved has shape " + saved.shape_text() + " and dtype " +
                            saved.dtype_name() + "; expected (" + std::to_string(call.saved_bytes()) +
                            ",) and uint8");
  }
  View y, h_n, c_n, cell_states, saved;
};

// What only the next layer reads: outputs, or gradients of inputs. Layers that run one after the other,
// up or down, need no more than two; those of a wavefront one each.
template <class T>
class Between {
 public:
  Between(const Call& call, bool wavefront) : call_(call), wavefront_(wavefront) {}

  Sequence<T> of(int layer) {
    auto& memory = memory_[wavefront_ ? layer : layer % 2];
    if (!memory) memory = std::make_unique<Memory>(bytes(call_, 1));
    return call_.dense(static_cast<T*>(memory->data()), call_.width);
  }

  // Whether a wavefront over so many layers takes little more memory than two of them.
  static bool is_small(const Call& call, int layers) {
    constexpr std::size_t most = std::size_t{32} << 20;
    return bytes(call, layers) <= most;
  }

 private:
  static std::size_t bytes(const Call& call, int layers) {
    return static_cast<std::size_t>(layers * call.rows * call.width) * sizeof(T);
  }

  const Call& call_;
  const bool wavefront_;
  std::map<int, std::unique_ptr<Memory>> memory_;
};

template <class T>
void run_layers(const Call& call, const Outputs& out, const Packed* packed, int threads) {
  const int layers = call.s.layers, directions = call.s.directions;
  clear_past_ends<T>(call, out.y, call.width);
  clear_past_ends<T>(call, out.cell_states, directions * call.hidden);
  keep_states<T>(call, out.h_n, call.h0, call.outputs);
  keep_states<T>(call, out.c_n, call.c0, call.hidden);
  std::vector<Layer<T>> jobs;
  jobs.reserve(static_cast<std::size_t>(call.numbers));
  for (int number = 0; number < call.numbers; ++number)
    jobs.push_back(call.layer<T>(number / directions, number % directions, out.cell_states, out.h_n,
                                 out.c_n, out.saved ? call.saved_of<T>(out.saved, number) : nullptr,
                                 packed ? packed->panels<T>(number) : nullptr));
  Wavefront plan;
  if (directions == 1 && Between<T>::is_small(call, layers))
    plan = wavefront(call.s.cell, jobs.data(), layers, false, threads);
  Between<T> between(call, static_cast<bool>(plan));
  Sequence<const T> x = call.sequence<const T>(call.x);
  for (int k = 0; k < layers; ++k) {
    Sequence<T> y = k == layers - 1 ? call.sequence<T>(out.y)
                    : out.saved     ? call.dense(call.saved_output<T>(out.saved, k), call.width)
                                    : between.of(k);
    Layer<T>* const own = &jobs[static_cast<std::size_t>(k * directions)];
    for (int d = 0; d < directions; ++d) {
      own[d].x = call.directed(x, d);
      own[d].y = call.own(y, d);
    }
    if (!plan) run_forward(call.s.cell, own, directions, threads);
    x = {y.data, y.step, y.row};
  }
  if (plan) run_forward(call.s.cell, plan, jobs.data(), layers);
}

void run(const Call& call, const Outputs& out, const Packed* packed, int threads) {
  std::optional<py::gil_scoped_release> release;
  if (call.is_long()) release.emplace();
  with_numbers(call.x.dtype(),
               [&](auto number) { run_layers<decltype(number)>(call, out, packed, threads); });
}

struct GradientViews {
  GradientViews(const Call& call, const GradientsOfOutputs& given, const GradientsOfInputs& wanted)
      : dy(given.y, "dy", false),
        dh_n(given.h_n, "dh_n", false),
        dc_n(given.c_n, "dc_n", false),
        dcell_states(given.cell_states, "dcell_states", false),
        dx(wanted.x, "dx", true),
        dh0(wanted.h0, "dh0", true),
        dc0(wanted.c0, "dc0", true),
        weights(call.read(wanted.weights, true)) {
    const Checker check(call.x);
    call.check_sequence(check, dy, call.width);
    call.check_sequence(check, dx, call.inputs);
    call.check_states(check, dh_n, dc_n);
    call.check_cell_states(check, dcell_states);
    call.check_states(check, dh0, dc0);
    call.check_weights(check, weights);
  }

  View dy, dh_n, dc_n, dcell_states, dx, dh0, dc0;
  AllWeights weights;
};

template <class T>
void run_back(const Call& call, const View& y, const View& saved, const GradientViews& grads,
              int threads) {
  const int layers = call.s.layers, directions = call.s.directions;
  clear_past_ends<T>(call, grads.dx, call.inputs);
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
  std::vector<Layer<T>> jobs;  // from the last layer to the lowest
  jobs.reserve(static_cast<std::size_t>(call.numbers));
  for (int k = layers - 1; k >= lowest; --k)
    for (int d = 0; d < directions; ++d)
      jobs.push_back(
          call.layer<T>(k, d, none, none, none, call.saved_of<T>(saved, k * directions + d), nullptr));
  Wavefront plan;
  if (directions == 1 && Between<T>::is_small(call, layers - lowest))
    plan = wavefront(call.s.cell, jobs.data(), layers - lowest, true, threads);
  Between<T> between(call, static_cast<bool>(plan));
  std::vector<Gradients<T>> wanted(jobs.size());
  Sequence<const T> dy = call.sequence<const T>(grads.dy);
  for (int k = layers - 1; k >= lowest; --k) {
    Sequence<const T> x = call.sequence<const T>(call.x);
    Sequence<T> dx = call.sequence<T>(grads.dx);
    if (k > 0) {
      const Sequence<T> below = output(k - 1);
      x = {below.data, below.step, below.row};
      dx = {};
    }
    if (k > lowest) dx = between.of(k);
    const auto first = static_cast<std::size_t>((layers - 1 - k) * directions);
    for (int d = 0; d < directions; ++d) {
      const int number = k * directions + d;
      const Weights& w = of(k, d);
      const std::size_t at = first + static_cast<std::size_t>(d);
      jobs[at].x = call.directed(x, d);
      jobs[at].y = call.own(output(k), d);
      wanted[at] = {call.own(dy, d),
                    call.cell_states_of<const T>(grads.dcell_states, k, d),
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
    if (!plan) run_backward(call.s.cell, &jobs[first], &wanted[first], directions, threads);
    dy = {dx.data, dx.step, dx.row};
  }
  if (plan) run_backward(call.s.cell, plan, jobs.data(), wanted.data(), layers - lowest);
}

}  // namespace

Stack::Stack(const Description& description) : description_(description) {
  const auto& [cell, layers, directions, single, reverse, bias, projected, batch_first, cell_states] =
      description;
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
  if (cell_states && !info.cell_state)
    throw py::value_error(std::string("the cell ") + info.name + " has no cell states");
}

void Stack::forward(int threads, const Inputs& inputs, const Written& outputs) const {
  Call call(description_, inputs);
  call.check_input();
  call.check_weights();
  call.check_states();
  run(call, Outputs(call, outputs), nullptr, threads);
}

// Of a call; without y where the kernels do not take the arguments.
struct Stack::Results {
  py::object y, h_n, c_n, cell_states, saved;
};

struct Stack::Form {
  int dims;
  index features;
};

Stack::Results Stack::results(const py::tuple& types, int threads, const Inputs& inputs,
                              const Form* form, py::handle save, const Packed* packed) const {
  for (py::handle object : {inputs.x, inputs.h0, inputs.c0, inputs.reset})
    if (!object.is_none() && !is_plain(object, types)) return {};
  for (py::handle object : inputs.weights)
    if (!is_plain(object, types)) return {};
  std::optional<Call> call;
  try {
    call.emplace(description_, inputs);
    call->check_input();
  } catch (const py::builtin_exception&) {
    return {};
  } catch (py::error_already_set&) {  // no strided memory: sparse, meta, nested
    return {};
  }
  if (form && (call->x.dims() != form->dims || call->inputs != form->features)) return {};
  if (!call->has_like_weights()) return {};
  call->check_weights();
  try {
    call->check_states();
  } catch (const py::builtin_exception&) {
    return {};
  }
  if (packed && !fits(*packed, *call))
    throw py::value_error("the packed weights are those of another stack");
  const bool has_c = call->info.cell_state;
  const Methods& methods = Methods::of(types);
  const py::object none = py::none();
  const py::handle x = inputs.x;
  Results made{new_sequence(methods, *call, x, call->width), none, none, none, none};
  if (!call->is_step) made.h_n = new_states(methods, *call, x, call->outputs);
  if (has_c) made.c_n = new_states(methods, *call, x, call->hidden);
  if (description_.cell_states)
    made.cell_states = new_sequence(methods, *call, x, call->s.directions * call->hidden);
  if (!save.is_none()) {
    Saved memory;
    try {
      memory = new_saved(call->x.dtype(), call->rows, call->hidden, call->outputs);
    } catch (const std::bad_alloc&) {  // torch's exception, after which programs try a smaller batch
      throw std::runtime_error("can't allocate memory: what backward needs of " +
                               std::to_string(call->rows) + " rows of " + std::to_string(call->hidden) +
                               " hidden units");
    }
    made.saved = save(py::cast(std::move(memory)));
  }
  const Written written{made.y, made.h_n, made.c_n, made.cell_states, made.saved};
  run(*call, Outputs(*call, written), packed, threads);
  return made;
}

py::object Stack::call(const py::tuple& types, int threads, const Inputs& inputs, py::handle save,
                       const Packed* packed) const {
  const auto [y, h_n, c_n, cell_states, saved] = results(types, threads, inputs, nullptr, save, packed);
  if (!y) return py::none();
  return py::make_tuple(y, h_n, c_n, cell_states, saved);
}

py::object Stack::call_module(const py::tuple& types, int threads, const ModuleInputs& inputs,
                              const Packed* packed) const {
  const py::none none;
  const auto& [x, hx, parameters, names, sizes, reset, dims, features] = inputs;
  if (!is_list_or_tuple(names)) return none;
  const bool has_c = cell_info(description_.cell).cell_state;
  py::object h0 = py::reinterpret_borrow<py::object>(hx), c0 = none;
  if (has_c && !hx.is_none()) {
    if (!is_list_or_tuple(hx) || PySequence_Fast_GET_SIZE(hx.ptr()) != 2) return none;
    h0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx.ptr(), 0));
    c0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx.ptr(), 1));
    if (h0.is_none() || c0.is_none()) return none;
  }
  py::list weights;
  for (Py_ssize_t at = 0; at < PySequence_Fast_GET_SIZE(names.ptr()); ++at) {
    const auto name = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(names.ptr(), at));
    PyObject* weight = PyDict_GetItemWithError(parameters.ptr(), name.ptr());
    if (!weight && PyErr_Occurred()) throw py::error_already_set();
    if (!weight) return none;
    weights.append(py::handle(weight));
  }
  const Form form{dims, PyNumber_AsSsize_t(features.ptr(), nullptr)};
  if (PyErr_Occurred()) {  // no integer
    PyErr_Clear();
    return none;
  }
  const auto [y, h_n, c_n, cell_states, saved] =
      results(types, threads, {x, h0, c0, std::move(weights), sizes, reset}, &form, none, packed);
  if (!y) return none;
  const bool is_cell = h_n.is_none();
  if (is_cell && !has_c) return y;
  if (is_cell || !has_c) return py::make_tuple(y, has_c ? c_n : h_n);
  const py::object states = py::make_tuple(h_n, c_n);
  if (description_.cell_states) return py::make_tuple(y, states, cell_states);
  return py::make_tuple(y, states);
}

bool Packed::is_of(const py::list& weights) const {
  if (weights.size() != weights_.size() || isa_ != kernels().name) return false;
  try {
    for (std::size_t at = 0; at < weights.size(); ++at) {
      const py::object packed = weights_[at];
      if (packed.is_none()) continue;
      if (!View(weights[at], "", false).is_at(View(packed, "", false))) return false;
    }
  } catch (const py::builtin_exception&) {
    return false;
  } catch (py::error_already_set&) {  // no strided memory
    return false;
  }
  return true;
}

bool Stack::fits(const Packed& packed, const Call& call) const {
  const Description& of = packed.of_;
  return packed.isa_ == kernels().name && of.cell == description_.cell &&
         of.layers == description_.layers && of.directions == description_.directions &&
         of.projected == description_.projected && packed.dtype_ == call.x.dtype() &&
         packed.inputs_ == call.inputs && packed.hidden_ == call.hidden &&
         packed.outputs_ == call.outputs;
}

void Stack::backward(int threads, const Inputs& inputs, py::handle y, py::handle saved,
                     const GradientsOfOutputs& given, const GradientsOfInputs& wanted) const {
  Call call(description_, inputs);
  call.check_input();
  call.check_weights();
  call.check_states();
  const Outputs left(call, {y, Py_None, Py_None, Py_None, saved});
  require(left.saved);
  const GradientViews grads(call, given, wanted);
  const py::gil_scoped_release release;
  with_numbers(call.x.dtype(), [&](auto number) {
    run_back<decltype(number)>(call, left.y, left.saved, grads, threads);
  });
}

namespace {

// Packs the weights of one direction of one layer.
template <class T>
std::unique_ptr<Memory> pack_one(const Call& call, int k, int direction) {
  const View none(Py_None, "", false);
  const CellKernels<T>& kernel = kernels().of<T>(call.s.cell);
  Layer<T> layer = call.layer<T>(k, direction, none, none, none, nullptr, nullptr);
  auto memory =
      std::make_unique<Memory>(static_cast<std::size_t>(kernel.panels_size(layer)) * sizeof(T));
  layer.panels = static_cast<T*>(memory->data());
  kernel.pack(layer);
  return memory;
}

}  // namespace

std::unique_ptr<Packed> Stack::pack(py::handle x, const py::list& weights) const {
  Call call(description_, {x, Py_None, Py_None, weights, Py_None, Py_None});
  call.check_input();
  call.check_weights();
  auto packed = std::make_unique<Packed>();
  for (py::handle weight : weights) {
    const bool is_bias = View(weight, "weight", false).dims() == 1;
    packed->weights_.append(is_bias ? py::none() : py::reinterpret_borrow<py::object>(weight));
  }
  packed->isa_ = kernels().name;
  packed->of_ = description_;
  packed->dtype_ = call.x.dtype();
  packed->inputs_ = call.inputs;
  packed->hidden_ = call.hidden;
  packed->outputs_ = call.outputs;
  for (int k = 0; k < description_.layers; ++k)
    for (int d = 0; d < description_.directions; ++d)
      packed->memory_.push_back(with_numbers(
          call.x.dtype(), [&](auto number) { return pack_one<decltype(number)>(call, k, d); }));
  return packed;
}

namespace {

constexpr bool is_large(std::size_t bytes) { return bytes >> 24; }  // about a millisecond

}  // namespace

void FreeSaved::operator()(Memory* memory) const {
  std::optional<py::gil_scoped_release> release;
  if (is_large(memory->size())) release.emplace();
  delete memory;
}

Saved Stack::new_saved(Dtype dtype, index rows, index hidden, index outputs) const {
  constexpr index most = index{1} << 40;
  const index layers = description_.layers, directions = description_.directions;
  if (rows < 0 || hidden < 0 || hidden > most || outputs < 0 || outputs > most)
    throw py::value_error("new_saved: an argument is out of range");
  return with_numbers(dtype, [&](auto number) {
    using T = decltype(number);
    const index row = kernels().of<T>(description_.cell).saved_row(hidden) * index{sizeof(Real<T>)};
    index part, between, bytes;  // as Call::saved_bytes
    if (__builtin_mul_overflow(rows, row, &part) ||
        __builtin_mul_overflow(part, layers * directions, &part) ||
        __builtin_mul_overflow(rows, outputs * directions, &between) ||
        __builtin_mul_overflow(between, (layers - 1) * index{sizeof(T)}, &between) ||
        __builtin_add_overflow(part, between, &bytes))
      throw py::value_error("new_saved: an argument is out of range");
    const auto size = static_cast<std::size_t>(bytes);
    std::optional<py::gil_scoped_release> release;
    if (is_large(size)) release.emplace();  // kept blocks that are too small are freed
    return Saved(new Memory(size));
  });
}

}  // namespace rnnfast

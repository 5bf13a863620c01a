#include "python/stack.h"

#include <algorithm>
#include <optional>

#include "python/tensor.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

// Methods of torch.Tensor, looked up once: a look-up costs half as much as a call.
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

py::object vectorcall(PyObject* function, PyObject* const* arguments, std::size_t count) {
  PyObject* result = PyObject_Vectorcall(function, arguments, count, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Whether a tensor has one of these exact types, and its memory does not hold the negatives of its
// values, as that of the imaginary part of a conjugate does. is_neg is the only method called here,
// since such methods release the GIL, which costs 45 ns each. (Zero tensors without memory have no
// address to read.)
bool is_plain(py::handle object, const py::tuple& types) {
  const auto is_type = [&](py::handle type) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr();
  };
  PyObject* const argument = object.ptr();
  return std::any_of(types.begin(), types.end(), is_type) &&
         vectorcall(Methods::of(types).is_neg, &argument, 1).ptr() != Py_True;
}

bool is_list_or_tuple(py::handle object) {
  return PyTuple_CheckExact(object.ptr()) || PyList_CheckExact(object.ptr());
}

// A new tensor like x in all but shape, uninitialised.
//
// Tried: Tensor.new saves a dispatch, 3 percent of a cell's call, but is undocumented.
// Tried: torch.empty and torch.empty_strided are no faster.
py::object new_like(const Methods& methods, py::handle x, std::initializer_list<index> shape) {
  py::object sizes[3];
  PyObject* arguments[4] = {x.ptr()};
  std::size_t count = 0;
  for (index size : shape) {
    sizes[count] = py::int_(size);
    arguments[count + 1] = sizes[count].ptr();
    ++count;
  }
  return vectorcall(methods.new_empty, arguments, count + 1);
}

py::object new_sequence(const Methods& methods, const Call& call, py::handle x, index features) {
  if (call.is_packed || call.is_step) return new_like(methods, x, {call.rows, features});
  return call.stack.batch_first ? new_like(methods, x, {call.batch, call.steps, features})
                                : new_like(methods, x, {call.steps, call.batch, features});
}

py::object new_states(const Methods& methods, const Call& call, py::handle x, index features) {
  return call.is_step ? new_like(methods, x, {call.batch, features})
                      : new_like(methods, x, {call.all_directions, call.batch, features});
}

// The tensors of a flat list of weights, or of their gradients.
std::vector<Tensor> weight_tensors(const Description& stack, const py::list& list, bool gradients) {
  std::vector<Tensor> tensors;
  tensors.reserve(list.size());
  for (std::size_t k = 0; k < list.size(); ++k)
    tensors.emplace_back(list[k], stack.weight_name(k, gradients), gradients);
  return tensors;
}

// The tensors that a call reads. They keep buffers alive.
struct InputTensors {
  InputTensors(const Description& description, const Inputs& inputs)
      : stack(description),
        x(inputs.x, "x", false),
        h0(inputs.h0, "h0", false),
        c0(inputs.c0, "c0", false),
        weights(weight_tensors(stack, inputs.weights, false)),
        sizes(inputs.sizes, "sizes", false),
        reset(inputs.reset, "reset", false) {}

  Call::Tensors views() const { return {x, h0, c0, all_weights(stack, weights), sizes, reset}; }

  const Description& stack;
  Tensor x, h0, c0;
  std::vector<Tensor> weights;
  Tensor sizes, reset;
};

// The tensors that a call writes.
struct OutputTensors {
  explicit OutputTensors(const WrittenTensors& written)
      : y(written.y, "y", true),
        h_n(written.h_n, "h_n", true),
        c_n(written.c_n, "c_n", true),
        cell_states(written.cell_states, "cell_states", true),
        saved(written.saved, "saved", true) {}

  Outputs views() const { return {y, h_n, c_n, cell_states, saved}; }

  Tensor y, h_n, c_n, cell_states, saved;
};

struct GradientTensors {
  GradientTensors(const Description& description, const GradientsOfOutputs& output_grads,
                  const GradientsOfInputs& input_grads)
      : stack(description),
        dy(output_grads.y, "dy", false),
        dh_n(output_grads.h_n, "dh_n", false),
        dc_n(output_grads.c_n, "dc_n", false),
        dcell_states(output_grads.cell_states, "dcell_states", false),
        dx(input_grads.x, "dx", true),
        dh0(input_grads.h0, "dh0", true),
        dc0(input_grads.c0, "dc0", true),
        weights(weight_tensors(stack, input_grads.weights, true)),
        dh_norms(input_grads.h_norms, "dh_norms", true),
        dc_norms(input_grads.c_norms, "dc_norms", true) {}

  GradientViews views() const {
    return {dy,       dh_n,    dc_n, dcell_states, dx, dh0, dc0, all_weights(stack, weights),
            dh_norms, dc_norms};
  }

  const Description& stack;
  Tensor dy, dh_n, dc_n, dcell_states, dx, dh0, dc0;
  std::vector<Tensor> weights;
  Tensor dh_norms, dc_norms;
};

void run(const Call& call, const OutputTensors& outputs, const Packed* packed, int threads) {
  const Outputs out = outputs.views();
  out.check(call);
  Panels panels;
  if (packed) panels = packed->panels();
  std::optional<py::gil_scoped_release> release;
  if (call.is_long()) release.emplace();
  rnnfast::forward(call, out, packed ? &panels : nullptr, threads);
}

}  // namespace

Stack::Stack(const Description& description) : description_(description) { description.check(); }

void Stack::forward(int threads, const Inputs& inputs, const WrittenTensors& outputs) const {
  const InputTensors tensors(description_, inputs);
  Call call(description_, tensors.views());
  call.check_input();
  call.check_weights();
  call.check_states();
  run(call, OutputTensors(outputs), nullptr, threads);
}

// The outputs of a call. y is null where the kernels do not take the inputs.
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
  std::optional<InputTensors> tensors;
  std::optional<Call> call;
  try {
    tensors.emplace(description_, inputs);
    call.emplace(description_, tensors->views());
    call->check_input();
  } catch (const std::invalid_argument&) {
    return {};
  } catch (const py::builtin_exception&) {
    return {};
  } catch (py::error_already_set&) {  // a tensor without strided memory: sparse, meta, nested
    return {};
  }
  if (form && (call->x.dims() != form->dims || call->inputs != form->features)) return {};
  if (!call->has_usable_weights()) return {};
  call->check_weights();
  try {
    call->check_states();
  } catch (const std::invalid_argument&) {
    return {};
  }
  if (packed && !fits(*packed, *call))
    throw std::invalid_argument("the packed weights are those of another stack");
  const bool has_c = call->info.cell_state;
  const Methods& methods = Methods::of(types);
  const py::object none = py::none();
  const py::handle x = inputs.x;
  Results outputs{new_sequence(methods, *call, x, call->width), none, none, none, none};
  if (!call->is_step) outputs.h_n = new_states(methods, *call, x, call->outputs);
  if (has_c) outputs.c_n = new_states(methods, *call, x, call->hidden);
  if (description_.cell_states)
    outputs.cell_states = new_sequence(methods, *call, x, call->stack.directions * call->hidden);
  if (!save.is_none()) {
    Saved memory = new_saved(call->x.dtype(), call->rows, call->hidden, call->outputs);
    outputs.saved = save(py::cast(std::move(memory)));
  }
  const WrittenTensors written{outputs.y, outputs.h_n, outputs.c_n, outputs.cell_states, outputs.saved};
  run(*call, OutputTensors(written), packed, threads);
  return outputs;
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
  const auto& [x, hx, parameters, names, sizes, reset, flat, dims, features] = inputs;
  if (!is_list_or_tuple(names)) return none;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(names.ptr());
  const bool has_flat = !flat.is_none();
  if (has_flat && !(PyList_Check(flat.ptr()) && PyList_GET_SIZE(flat.ptr()) == count)) return none;
  const bool has_c = cell_info(description_.cell).cell_state;
  py::object h0 = py::reinterpret_borrow<py::object>(hx), c0 = none;
  if (has_c && !hx.is_none()) {
    if (!is_list_or_tuple(hx) || PySequence_Fast_GET_SIZE(hx.ptr()) != 2) return none;
    h0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx.ptr(), 0));
    c0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx.ptr(), 1));
    if (h0.is_none() || c0.is_none()) return none;
  }
  py::list weights;
  for (Py_ssize_t k = 0; k < count; ++k) {
    const auto name = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(names.ptr(), k));
    PyObject* weight = PyDict_GetItemWithError(parameters.ptr(), name.ptr());
    if (!weight && PyErr_Occurred()) throw py::error_already_set();
    if (!weight || (has_flat && weight != PyList_GET_ITEM(flat.ptr(), k))) return none;
    weights.append(py::handle(weight));
  }
  const Form form{dims, PyNumber_AsSsize_t(features.ptr(), nullptr)};
  if (PyErr_Occurred()) {  // features is no integer
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

Panels Packed::panels() const {
  Panels panels;
  for (const auto& memory : memory_) panels.push_back(memory->data());
  return panels;
}

bool Packed::is_of(const py::list& weights) const {
  if (weights.size() != weights_.size() || isa_ != kernels().name) return false;
  try {
    for (std::size_t k = 0; k < weights.size(); ++k) {
      const py::object packed = weights_[k];
      if (packed.is_none()) continue;
      if (!Tensor(weights[k], "", false).is_at(Tensor(packed, "", false))) return false;
    }
  } catch (const std::invalid_argument&) {
    return false;
  } catch (const py::builtin_exception&) {
    return false;
  } catch (py::error_already_set&) {  // a tensor without strided memory
    return false;
  }
  return true;
}

bool Stack::fits(const Packed& packed, const Call& call) const {
  const Description& description = packed.description_;
  return packed.isa_ == kernels().name && description.cell == description_.cell &&
         description.layers == description_.layers &&
         description.directions == description_.directions &&
         description.projected == description_.projected &&
         description.precision == description_.precision && packed.dtype_ == call.x.dtype() &&
         packed.inputs_ == call.inputs && packed.hidden_ == call.hidden &&
         packed.outputs_ == call.outputs;
}

void Stack::backward(int threads, const Inputs& inputs, py::handle y, py::handle saved,
                     const GradientsOfOutputs& output_grads,
                     const GradientsOfInputs& input_grads) const {
  const InputTensors tensors(description_, inputs);
  Call call(description_, tensors.views());
  call.check_input();
  call.check_weights();
  call.check_states();
  const OutputTensors outputs({y, Py_None, Py_None, Py_None, saved});
  outputs.views().check(call);
  require(outputs.saved);
  const GradientTensors gradients(description_, output_grads, input_grads);
  const GradientViews grads = gradients.views();
  grads.check(call);
  const py::gil_scoped_release release;
  rnnfast::backward(call, outputs.y, outputs.saved, grads, threads);
}

std::unique_ptr<Packed> Stack::pack(py::handle x, const py::list& weights) const {
  const InputTensors tensors(description_, {x, Py_None, Py_None, weights, Py_None, Py_None});
  Call call(description_, tensors.views());
  call.check_input();
  call.check_weights();
  auto packed = std::make_unique<Packed>();
  for (std::size_t k = 0; k < weights.size(); ++k)
    packed->weights_.append(tensors.weights[k].dims() == 1 ? py::object(py::none())
                                                           : py::object(weights[k]));
  packed->isa_ = kernels().name;
  packed->description_ = description_;
  packed->dtype_ = call.x.dtype();
  packed->inputs_ = call.inputs;
  packed->hidden_ = call.hidden;
  packed->outputs_ = call.outputs;
  packed->memory_ = rnnfast::pack(call);
  return packed;
}

namespace {

constexpr bool is_large(std::size_t bytes) { return bytes >> 24; }  // freeing it takes a millisecond

}  // namespace

void FreeSaved::operator()(Memory* memory) const {
  std::optional<py::gil_scoped_release> release;
  if (is_large(memory->size())) release.emplace();
  delete memory;
}

Saved Stack::new_saved(Dtype dtype, index rows, index hidden, index outputs) const {
  const auto bytes = saved_bytes(description_, dtype, rows, hidden, outputs);
  if (!bytes) throw std::invalid_argument("new_saved: an argument is out of range");
  std::optional<py::gil_scoped_release> release;
  if (is_large(*bytes)) release.emplace();  // Memory may free kept blocks that are too small
  return Saved(new Memory(*bytes));
}

}  // namespace rnnfast

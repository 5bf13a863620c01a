// The module _C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/plan.h"
#include "cpu/threads.h"
#include "python/generate.h"
#include "python/rates.h"
#include "python/stack.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = RNNFAST_COMPILER;
  info["isas"] = built_isas();
#ifdef _OPENMP  // not with Clang (csrc/cpu/threads.cpp)
  info["openmp"] = std::to_string(_OPENMP);
#endif
  return info;
}

py::dict onnx_of(const Onnx& onnx) {
  py::dict attributes;
  attributes["op"] = onnx.op;
  attributes["order"] = py::tuple(py::cast(std::vector<int>(onnx.order, onnx.order + onnx.blocks)));
  attributes["activation"] = onnx.activation;
  attributes["linear_before_reset"] =
      onnx.linear_before_reset < 0 ? py::object(py::none()) : py::cast(onnx.linear_before_reset);
  return attributes;
}

template <class T, class F>
py::tuple tuple_of(const T* items, int count, F f) {
  py::tuple tuple(count);
  for (int i = 0; i < count; ++i) tuple[i] = f(items[i]);
  return tuple;
}

// The table of cells. The index of a cell is its number.
py::list cells() {
  const auto range = [](Gates gates) { return py::make_tuple(gates.begin, gates.end); };
  py::list table;
  for (int number = 0; number < kernels().cells; ++number) {
    const CellInfo& info = kernels().info[number];
    py::dict cell;
    cell["number"] = number;
    cell["name"] = info.name;
    cell["gates"] = info.gates;
    cell["weight_blocks"] = info.weight_blocks;
    cell["block_names"] = info.block_names;
    cell["weight_block"] = tuple_of(info.weight_block, info.gates, [](int block) { return block; });
    cell["input"] = range(info.input);
    cell["recurrent"] = tuple_of(info.recurrent, info.stages, range);
    cell["stages"] = info.stages;
    cell["has_c"] = info.cell_state;
    cell["projects"] = info.projects;
    cell["onnx"] = onnx_of(info.onnx);
    table.append(cell);
  }
  return table;
}

Saved new_saved(const Stack& stack, const std::string& dtype, index rows, index hidden, index outputs) {
  return stack.new_saved(number_named(dtype), rows, hidden, outputs);
}

std::vector<std::string> supported_isas_with(const std::string& dtype) {
  if (dtype.empty()) return supported_isas();
  return with_numbers(number_named(dtype), [](auto number) { return isas_with<decltype(number)>(); });
}

constexpr std::pair<const char*, Partition> partitions[] = {{"chosen", Partition::chosen},
                                                            {"one", Partition::one},
                                                            {"rows", Partition::rows},
                                                            {"units", Partition::units},
                                                            {"directions", Partition::directions},
                                                            {"wavefront", Partition::wavefront}};

void force_partition(const std::string& name, bool oversubscribe) {
  std::string known;
  for (const auto& [text, partition] : partitions) {
    if (name == text) return force(partition, oversubscribe);
    known += (known.empty() ? "'" : ", '") + std::string(text) + "'";
  }
  throw py::value_error("partition is '" + name + "'; expected one of " + known);
}

std::pair<std::string, int> used_partition() {
  const Usage usage = last_usage();
  for (const auto& [text, partition] : partitions)
    if (partition == usage.partition) return {text, usage.threads};
  return {};
}

// The arguments of a method of the C API. pybind11 takes half a microsecond to convert so many
// arguments.
class Arguments {
 public:
  Arguments(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected) : next_(arguments) {
    if (count != expected)
      throw py::type_error("incompatible arguments: got " + std::to_string(count) + ", expected " +
                           std::to_string(expected));
  }
  py::handle next() { return *next_++; }
  template <class T>
  T next_as() {
    const py::handle object = next();
    try {
      // A cast to a py:: type would convert an object of another type.
      if (!std::is_base_of_v<py::object, T> || py::isinstance<T>(object)) return py::cast<T>(object);
    } catch (const py::cast_error&) {
    }
    throw py::type_error("incompatible arguments: one is of type " +
                         std::string(Py_TYPE(object.ptr())->tp_name));
  }
  const Packed* next_packed() {
    return py::handle(*next_).is_none() ? (++next_, nullptr) : next_as<const Packed*>();
  }

 private:
  PyObject* const* next_;
};

// The entries of a tuple that stands for a struct of stack.h.
template <std::size_t n>
std::array<py::handle, n> entries(const py::tuple& tuple, const char* name) {
  if (tuple.size() != n)
    throw py::type_error(std::string(name) + " has " + std::to_string(tuple.size()) +
                         " entries; expected " + std::to_string(n));
  std::array<py::handle, n> handles;
  for (std::size_t k = 0; k < n; ++k) handles[k] = PyTuple_GET_ITEM(tuple.ptr(), k);
  return handles;
}

py::list weights_of(py::handle object) {
  if (!PyList_Check(object.ptr()))
    throw py::type_error("weights must be a list, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  return py::reinterpret_borrow<py::list>(object);
}

Inputs inputs_of(const py::tuple& tuple) {
  const auto [x, h0, c0, weights, sizes, reset] = entries<6>(tuple, "inputs");
  return {x, h0, c0, weights_of(weights), sizes, reset};
}

void forward_stack(const Stack& stack, int threads, const py::tuple& inputs, const py::tuple& outputs) {
  const auto [y, h_n, c_n, cell_states, saved] = entries<5>(outputs, "outputs");
  stack.forward(threads, inputs_of(inputs), {y, h_n, c_n, cell_states, saved});
}

void backward_stack(const Stack& stack, int threads, const py::tuple& inputs, py::handle y,
                    py::handle saved, const py::tuple& output_grads, const py::tuple& input_grads) {
  const auto [dy, dh_n, dc_n, dcell_states] = entries<4>(output_grads, "the gradients of the outputs");
  const auto [dx, dh0, dc0, dweights, dh_norms, dc_norms] =
      entries<6>(input_grads, "the gradients of the inputs");
  stack.backward(threads, inputs_of(inputs), y, saved, {dy, dh_n, dc_n, dcell_states},
                 {dx, dh0, dc0, weights_of(dweights), dh_norms, dc_norms});
}

py::object call(const Stack& stack, PyObject* const* arguments, Py_ssize_t count) {
  Arguments a(arguments, count, 5);
  const auto types = a.next_as<py::tuple>();
  const int threads = a.next_as<int>();
  const auto inputs = a.next_as<py::tuple>();
  const py::handle save = a.next();
  const Packed* const packed = a.next_packed();
  return stack.call(types, threads, inputs_of(inputs), save, packed);
}

py::object call_module(const Stack& stack, PyObject* const* arguments, Py_ssize_t count) {
  Arguments a(arguments, count, 6);
  const auto types = a.next_as<py::tuple>();
  const int threads = a.next_as<int>();
  const auto [x, hx, parameters, names, sizes, reset, flat] =
      entries<7>(a.next_as<py::tuple>(), "inputs");
  if (!PyDict_Check(parameters.ptr()))
    throw py::type_error("parameters must be a dict, got " +
                         std::string(Py_TYPE(parameters.ptr())->tp_name));
  const int dims = a.next_as<int>();
  const py::handle features = a.next();
  const Packed* const packed = a.next_packed();
  return stack.call_module(
      types, threads,
      {x, hx, py::reinterpret_borrow<py::dict>(parameters), names, sizes, reset, flat, dims, features},
      packed);
}

py::object is_of(const Packed& packed, PyObject* const* arguments, Py_ssize_t count) {
  Arguments a(arguments, count, 1);
  return py::bool_(packed.is_of(a.next_as<py::list>()));
}

template <class T, py::object (*f)(const T&, PyObject* const*, Py_ssize_t)>
PyObject* method(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return f(py::cast<const T&>(py::handle(self)), arguments, count).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const WrongType& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class T, py::object (*f)(const T&, PyObject* const*, Py_ssize_t)>
void add_method(py::handle type, const char* name) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method<T, f>)), METH_FASTCALL,
      nullptr};
  PyObject* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
  if (!descriptor) throw py::error_already_set();
  type.attr(name) = py::reinterpret_steal<py::object>(descriptor);
}

}  // namespace
}  // namespace rnnfast

PYBIND11_MODULE(_C, m) {
  using namespace rnnfast;
  translate_errors();
  kernels();  // where RNNFAST_ISA names an instruction set that cannot run, the import fails here
  py::class_<Memory, Saved>(m, "Block", py::buffer_protocol()).def_buffer([](Memory& memory) {
    return py::buffer_info(static_cast<unsigned char*>(memory.data()),
                           static_cast<py::ssize_t>(memory.size()));
  });
  add_method<Packed, is_of>(py::class_<Packed>(m, "Packed"), "is_of");
  auto stack = py::class_<Stack>(m, "Stack");
  stack
      .def(py::init([](int cell, int layers, int directions, bool single, bool reverse, bool bias,
                       bool projected, bool batch_first, bool cell_states, int precision) {
             if (precision < 0 || precision > 2)
               throw py::value_error("precision is " + std::to_string(precision) +
                                     "; expected 0 (highest), 1 (high) or 2 (medium)");
             return Stack({cell, layers, directions, single, reverse, bias, projected, batch_first,
                           cell_states, static_cast<Precision>(precision)});
           }),
           py::kw_only(), py::arg("cell"), py::arg("layers") = 1, py::arg("directions") = 1,
           py::arg("single") = false, py::arg("reverse") = false, py::arg("bias") = true,
           py::arg("projected") = false, py::arg("batch_first") = false, py::arg("cell_states") = false,
           py::arg("precision") = 0)
      .def("forward", &forward_stack)
      .def("pack", &Stack::pack)
      .def("backward", &backward_stack)
      .def("new_saved", &new_saved);
  add_method<Stack, call>(stack, "call");
  add_method<Stack, call_module>(stack, "call_module");
  add_generate(m);
  m.def("release_memory", &release_memory);
  m.def("cells", &cells);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("supported_isas", &supported_isas_with, py::arg("dtype") = "");
  m.def("force_isa", &force_isa, py::arg(), py::pos_only());
  m.def("force_float32_parts", &force_float32_parts, py::arg(), py::pos_only());
  m.def("build_info", &build_info);
  m.def("max_threads", &max_threads);
  m.def("force_partition", &force_partition, py::arg(), py::pos_only(),
        py::arg("oversubscribe") = false);
  m.def("used_partition", &used_partition);
  add_rates(m);
}

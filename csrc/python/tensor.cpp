#include "python/tensor.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace rnnfast {
namespace {

// The part of the binary interface of DLPack 1 that is used here.
namespace dlpack {
struct Struct {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t dtype_lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct Exchange {
  std::uint32_t major, minor;
  Exchange* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*view)(void* object, Struct* out);  // non-owning; 0 on success
  void* current_stream;
};
constexpr int code_int = 0, code_uint = 1, code_float = 2, code_bfloat = 4, code_bool = 6;
}  // namespace dlpack

// The exchange table of a type, or null. Callers use few types (Tensor, Parameter), so the tables of
// the last four are kept.
const dlpack::Exchange* exchange_of(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::Exchange* table;
  };
  static Entry cache[4] = {};
  static int next = 0;
  for (const Entry& entry : cache)
    if (entry.type == type) return entry.table;
  const dlpack::Exchange* table = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    table = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (table && table->major != 1) table = nullptr;
  PyErr_Clear();
  Py_XDECREF(capsule);  // the type keeps it alive
  Py_INCREF(type);
  Py_XDECREF(cache[next].type);
  cache[next] = {type, table};
  next = (next + 1) % 4;
  return table;
}

Dtype float_of_bytes(py::ssize_t bytes) {
  return bytes == 4   ? Dtype::float32
         : bytes == 8 ? Dtype::float64
         : bytes == 2 ? Dtype::float16
                      : Dtype::other;
}

std::string name_of(const dlpack::Struct& t) {
  const std::string bits = std::to_string(t.bits);
  return t.code == dlpack::code_float    ? "float" + bits
         : t.code == dlpack::code_bfloat ? "bfloat" + bits
         : t.code == dlpack::code_int    ? "int" + bits
         : t.code == dlpack::code_uint
             ? "uint" + bits
             : "DLPack type " + std::to_string(t.code) + ", " + bits + " bits";
}

std::string not_in_message(Place place) {
  return std::string("it is not in ") + (place == Place::cpu ? "CPU" : "CUDA") + " memory";
}

}  // namespace

Tensor::Tensor(py::handle object, const char* name, bool writable, Place place) : View(name) {
  if (object.is_none()) return;
  present_ = true;
  if (!read_exchange_api(object, place) && !read_torch_methods(object, place)) {
    if (place != Place::cpu) refuse(not_in_message(place));
    read_buffer(object, writable);
  }
  std::int64_t elements = 1;
  for (int dim = 0; dim < dims_; ++dim) elements *= shape_[dim];
  if (elements == 0) return;
  if (!data_) refuse("it has no memory");
  for (int dim = 0; dim < dims_; ++dim)
    if (writable && shape_[dim] > 1 && strides_[dim] == 0) refuse("its elements share memory");
}

void Tensor::set_other_dtype(const std::string& name) {
  name.copy(other_dtype_, sizeof other_dtype_ - 1);
}

void Tensor::refuse(const std::string& why) const {
  throw std::invalid_argument(std::string(name_) + " cannot be used: " + why);
}

bool Tensor::read_exchange_api(py::handle object, Place place) {
  const dlpack::Exchange* table = exchange_of(Py_TYPE(object.ptr()));
  if (!table) return false;
  dlpack::Struct t{};
  if (table->view(object.ptr(), &t) != 0) throw py::error_already_set();
  if (t.device_type != static_cast<int>(place)) refuse(not_in_message(place));
  device_ = t.device_id;
  if (t.ndim > most_dims) refuse("it has " + std::to_string(t.ndim) + " dimensions");
  data_ = static_cast<char*>(t.data) + t.byte_offset;
  dims_ = t.ndim;
  for (int dim = 0; dim < dims_; ++dim) {
    shape_[dim] = t.shape[dim];
    strides_[dim] = t.strides[dim];
  }
  if (t.code == dlpack::code_float && t.dtype_lanes == 1) dtype_ = float_of_bytes(t.bits / 8);
  if (t.code == dlpack::code_bfloat && t.bits == 16) dtype_ = Dtype::bfloat16;
  if (t.code == dlpack::code_int && t.bits == 64) dtype_ = Dtype::int64;
  if (t.code == dlpack::code_uint && t.bits == 8) dtype_ = Dtype::uint8;
  if (t.code == dlpack::code_bool && t.bits == 8) dtype_ = Dtype::boolean;
  if (dtype_ == Dtype::other) set_other_dtype(name_of(t));
  return true;
}

bool Tensor::read_torch_methods(py::handle object, Place place) {
  if (!py::hasattr(object, "data_ptr")) return false;
  const py::object device = object.attr("device");
  if (py::str(device.attr("type")).cast<std::string>() != (place == Place::cpu ? "cpu" : "cuda"))
    refuse(not_in_message(place));
  if (place != Place::cpu) device_ = device.attr("index").cast<int>();
  data_ = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
  const auto shape = object.attr("shape").cast<std::vector<std::int64_t>>();
  const auto strides = object.attr("stride")().cast<std::vector<std::int64_t>>();
  if (shape.size() > most_dims) refuse("it has " + std::to_string(shape.size()) + " dimensions");
  if (strides.size() != shape.size()) refuse("its shape and its strides differ in length");
  dims_ = static_cast<int>(shape.size());
  for (int dim = 0; dim < dims_; ++dim) {
    shape_[dim] = shape[dim];
    strides_[dim] = strides[dim];
  }
  auto dtype = py::str(object.attr("dtype")).cast<std::string>();
  if (dtype.rfind("torch.", 0) == 0) dtype = dtype.substr(6);
  dtype_ = dtype_named(dtype);
  set_other_dtype(dtype);
  return true;
}

void Tensor::read_buffer(py::handle object, bool writable) {
  const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
  auto buffer = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), buffer.get(), flags) != 0) throw py::error_already_set();
  buffer_.reset(buffer.release());
  const Py_buffer& view = *buffer_;
  if (view.itemsize < 1) refuse("its items have no size");
  if (view.ndim > most_dims) refuse("it has " + std::to_string(view.ndim) + " dimensions");
  data_ = view.buf;
  dims_ = view.ndim;
  const std::string format = view.format ? view.format : "B";
  if (format == "e" || format == "f" || format == "d") {
    dtype_ = float_of_bytes(view.itemsize);
  } else if (format.size() == 1 && std::string("bhilq").find(format) != std::string::npos) {
    dtype_ = view.itemsize == 8 ? Dtype::int64 : Dtype::other;
    set_other_dtype("int" + std::to_string(8 * view.itemsize));
  } else if (format == "?") {
    dtype_ = Dtype::boolean;
  } else if (format == "B") {
    dtype_ = Dtype::uint8;
  } else {
    set_other_dtype("buffer format " + format);
  }
  for (int dim = 0; dim < dims_; ++dim) {
    shape_[dim] = view.shape[dim];
    if (shape_[dim] > 1 && view.strides[dim] % view.itemsize != 0)
      refuse("its strides are no multiple of its item size");
    strides_[dim] = view.strides[dim] / view.itemsize;
  }
  if (reinterpret_cast<std::uintptr_t>(data_) % static_cast<std::uintptr_t>(view.itemsize) != 0)
    refuse("its memory is not aligned to its item size");
}

}  // namespace rnnfast

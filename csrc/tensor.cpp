#include "tensor.h"

#include <cstring>

namespace py = pybind11;

namespace rnnfast {
namespace {

// The binary interface of DLPack 1, as far as it is used here.
namespace dlpack {
struct Tensor {
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
  int (*view)(void* object, Tensor* out);  // non-owning; 0 on success
  void* current_stream;
};
constexpr int code_int = 0, code_uint = 1, code_float = 2, code_bfloat = 4, code_bool = 6;
}  // namespace dlpack

// The exchange table of a type, or null. Types are few (Tensor, Parameter), so the last ones are kept.
const dlpack::Exchange* exchange_of(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const dlpack::Exchange* table;
  };
  static Known known[4] = {};
  static int next = 0;
  for (const Known& k : known)
    if (k.type == type) return k.table;
  const dlpack::Exchange* table = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    table = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (table && table->major != 1) table = nullptr;
  PyErr_Clear();
  Py_XDECREF(capsule);  // the type keeps it alive
  Py_INCREF(type);
  Py_XDECREF(known[next].type);
  known[next] = {type, table};
  next = (next + 1) % 4;
  return table;
}

Dtype float_of_bytes(py::ssize_t bytes) {
  return bytes == 4   ? Dtype::float32
         : bytes == 8 ? Dtype::float64
         : bytes == 2 ? Dtype::float16
                      : Dtype::other;
}

std::string not_in(Place place) {
  return std::string("it is not in ") + (place == Place::cpu ? "CPU" : "CUDA") + " memory";
}

}  // namespace

Dtype dtype_named(const std::string& name) {
  return name == "float32"    ? Dtype::float32
         : name == "float64"  ? Dtype::float64
         : name == "bfloat16" ? Dtype::bfloat16
         : name == "float16"  ? Dtype::float16
         : name == "int64"    ? Dtype::int64
         : name == "uint8"    ? Dtype::uint8
         : name == "bool"     ? Dtype::boolean
                              : Dtype::other;
}

View::View(py::handle object, const char* name, bool writable, Place place) : name_(name) {
  if (object.is_none()) return;
  present_ = true;
  if (!read_exchange_api(object, place) && !read_torch_methods(object, place)) {
    if (place != Place::cpu) refuse(not_in(place));
    read_buffer(object, writable);
  }
  std::int64_t elements = 1;
  for (int dim = 0; dim < dims_; ++dim) elements *= shape_[dim];
  if (elements == 0) return;
  if (!data_) refuse("it has no memory");
  for (int dim = 0; dim < dims_; ++dim)
    if (writable && shape_[dim] > 1 && strides_[dim] == 0) refuse("its elements share memory");
}

void View::refuse(const std::string& why) const {
  throw py::value_error(std::string(name_) + " cannot be used: " + why);
}

bool View::read_exchange_api(py::handle object, Place place) {
  const dlpack::Exchange* table = exchange_of(Py_TYPE(object.ptr()));
  if (!table) return false;
  dlpack::Tensor t{};
  if (table->view(object.ptr(), &t) != 0) throw py::error_already_set();
  if (t.device_type != static_cast<int>(place)) refuse(not_in(place));
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
  code_ = t.code;
  bits_ = t.bits;
  return true;
}

bool View::read_torch_methods(py::handle object, Place place) {
  if (!py::hasattr(object, "data_ptr")) return false;
  const py::object device = object.attr("device");
  if (py::str(device.attr("type")).cast<std::string>() != (place == Place::cpu ? "cpu" : "cuda"))
    refuse(not_in(place));
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
  dtype_name_ = py::str(object.attr("dtype")).cast<std::string>();
  if (dtype_name_.rfind("torch.", 0) == 0) dtype_name_ = dtype_name_.substr(6);
  dtype_ = dtype_named(dtype_name_);
  return true;
}

void View::read_buffer(py::handle object, bool writable) {
  const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
  Py_buffer& view = buffer_.view;
  if (PyObject_GetBuffer(object.ptr(), &view, flags) != 0) throw py::error_already_set();
  buffer_.held = true;
  if (view.itemsize < 1) refuse("its items have no size");
  if (view.ndim > most_dims) refuse("it has " + std::to_string(view.ndim) + " dimensions");
  data_ = view.buf;
  dims_ = view.ndim;
  const std::string format = view.format ? view.format : "B";
  const std::string bits = std::to_string(8 * view.itemsize);
  if (format == "e" || format == "f" || format == "d") {
    dtype_ = float_of_bytes(view.itemsize);
    dtype_name_ = "float" + bits;
  } else if (format.size() == 1 && std::string("bhilq").find(format) != std::string::npos) {
    dtype_ = view.itemsize == 8 ? Dtype::int64 : Dtype::other;
    dtype_name_ = "int" + bits;
  } else if (format == "?") {
    dtype_ = Dtype::boolean;
    dtype_name_ = "bool";
  } else if (format == "B") {
    dtype_ = Dtype::uint8;
    dtype_name_ = "uint8";
  } else {
    dtype_name_ = "buffer format " + format;
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

std::string View::dtype_name() const {
  if (code_ < 0) return dtype_name_;
  if (code_ == dlpack::code_bool) return "bool";
  const std::string bits = std::to_string(bits_);
  return code_ == dlpack::code_float    ? "float" + bits
         : code_ == dlpack::code_bfloat ? "bfloat" + bits
         : code_ == dlpack::code_int    ? "int" + bits
         : code_ == dlpack::code_uint ? "uint" + bits
                                      : "DLPack type " + std::to_string(code_) + ", " + bits + " bits";
}

bool View::is_at(const View& other) const {
  bool same = present_ == other.present_ && data_ == other.data_ && dtype_ == other.dtype_ &&
              dims_ == other.dims_ && device_ == other.device_;
  for (int dim = 0; same && dim < dims_; ++dim)
    same = shape_[dim] == other.shape_[dim] && strides_[dim] == other.strides_[dim];
  return same;
}

bool View::has_contiguous_rows() const {
  for (int dim = 0; dim < dims_; ++dim)
    if (shape_[dim] == 0) return true;
  return dims_ == 0 || shape_[dims_ - 1] == 1 || strides_[dims_ - 1] == 1;
}

void View::require_shape(std::initializer_list<std::int64_t> expected, bool contiguous) const {
  bool same = dims_ == static_cast<int>(expected.size());
  int dim = 0;
  for (const std::int64_t size : expected) same = same && shape_[dim++] == size;
  if (!same) {
    std::string text;
    for (const std::int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
    throw py::value_error(std::string(name_) + " has shape " + shape_text() + "; expected (" + text +
                          (expected.size() == 1 ? ",)" : ")"));
  }
  if (contiguous && !has_contiguous_rows())
    throw py::value_error(std::string(name_) +
                          " must have its last dimension contiguous; its stride is " +
                          std::to_string(strides_[dims_ - 1]));
}

std::string View::shape_text() const {
  std::string text = "(";
  for (int dim = 0; dim < dims_; ++dim) text += (dim ? ", " : "") + std::to_string(shape_[dim]);
  return text + (dims_ == 1 ? ",)" : ")");
}

}  // namespace rnnfast

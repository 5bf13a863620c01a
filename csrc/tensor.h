// A view of a Python object's memory: a torch tensor or anything with the buffer protocol, such as a
// NumPy array; where it must be in a GPU's memory, only a torch tensor. torch tensors are read through
// the DLPack C exchange API (dlpack.h 1.2, "DLPackExchangeAPI"), which costs nanoseconds, or by their
// Python methods where torch is too old to have it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "layer.h"

namespace rnnfast {

enum class Dtype { float32, float64, bfloat16, float16, int64, uint8, boolean, other };

Dtype dtype_named(const std::string& name);  // as NumPy and torch name them

class View {
 public:
  static constexpr int most_dims = 3;

  View(pybind11::handle object, const char* name, bool writable, Place place = Place::cpu);
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  explicit operator bool() const { return present_; }
  const char* name() const { return name_; }
  Dtype dtype() const { return dtype_; }
  std::string dtype_name() const;
  int dims() const { return dims_; }
  std::int64_t size(int dim) const { return shape_[dim]; }
  std::int64_t stride(int dim) const { return strides_[dim]; }  // in elements
  void* data() const { return data_; }
  int device() const { return device_; }  // its number, among those of its place
  std::string shape_text() const;
  // Whether the other one has the same address, shape, strides and dtype.
  bool is_at(const View& other) const;
  // Whether every row, the last dimension, is contiguous; so it is where there are no elements.
  bool has_contiguous_rows() const;
  // Raises where the shape is another one, or where rows are not contiguous though they must be.
  void require_shape(std::initializer_list<std::int64_t> expected, bool contiguous = true) const;

 private:
  bool read_exchange_api(pybind11::handle object, Place place);
  bool read_torch_methods(pybind11::handle object, Place place);
  void read_buffer(pybind11::handle object, bool writable);
  [[noreturn]] void refuse(const std::string& why) const;

  const char* name_;
  bool present_ = false;
  struct Buffer {
    Buffer() = default;
    ~Buffer() {
      if (held) PyBuffer_Release(&view);
    }
    Py_buffer view{};
    bool held = false;
  } buffer_;
  void* data_ = nullptr;
  Dtype dtype_ = Dtype::other;
  std::string dtype_name_;    // where its code and bits do not say it
  int code_ = -1, bits_ = 0;  // DLPack's
  int dims_ = 0, device_ = 0;
  std::int64_t shape_[most_dims]{}, strides_[most_dims]{};
};

}  // namespace rnnfast

// What is known of a tensor in memory: its address, shape, strides and dtype. A View owns nothing.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace rnnfast {

enum class Dtype { float32, float64, bfloat16, float16, int64, uint8, boolean, other };

Dtype dtype_named(const std::string& name);  // as NumPy and torch name them

// Calls copy it often, so it has only numbers and pointers.
class View {
 public:
  static constexpr int most_dims = 3;

  // An absent tensor.
  explicit View(const char* name) : name_(name) {}
  // A tensor in memory without gaps. Errors name it `name`.
  View(const char* name, void* data, Dtype dtype, std::initializer_list<std::int64_t> shape);

  explicit operator bool() const { return present_; }
  const char* name() const { return name_; }
  Dtype dtype() const { return dtype_; }
  std::string dtype_name() const;
  int dims() const { return dims_; }
  std::int64_t size(int dim) const { return shape_[dim]; }
  std::int64_t stride(int dim) const { return strides_[dim]; }  // in elements
  void* data() const { return data_; }
  int device() const { return device_; }  // the number of its GPU
  std::string shape_text() const;
  // Whether the other tensor has the same address, shape, strides and dtype.
  bool is_at(const View& other) const;
  // Whether the last dimension is contiguous. It counts as contiguous where there are no elements.
  bool has_contiguous_rows() const;
  // Throws std::invalid_argument where the shape is not `expected`, or where the last dimension must be
  // `contiguous` and is not.
  void require_shape(std::initializer_list<std::int64_t> expected, bool contiguous = true) const;

 protected:
  const char* name_;
  bool present_ = false;
  void* data_ = nullptr;
  Dtype dtype_ = Dtype::other;
  char other_dtype_[32]{};  // the dtype's name, where dtype_ is `other`
  int dims_ = 0, device_ = 0;
  std::int64_t shape_[most_dims]{}, strides_[most_dims]{};
};

}  // namespace rnnfast

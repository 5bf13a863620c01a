#include "core/view.h"

#include <stdexcept>

namespace rnnfast {
namespace {

// In the order of Dtype.
constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int64", "uint8", "bool"};

}  // namespace

Dtype dtype_named(const std::string& name) {
  int number = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Dtype>(number);
    ++number;
  }
  return Dtype::other;
}

View::View(const char* name, void* data, Dtype dtype, std::initializer_list<std::int64_t> shape)
    : name_(name), present_(true), data_(data), dtype_(dtype), dims_(static_cast<int>(shape.size())) {
  int dim = 0;
  for (const std::int64_t size : shape) shape_[dim++] = size;
  std::int64_t stride = 1;
  while (dim-- > 0) {
    strides_[dim] = stride;
    stride *= shape_[dim];
  }
}

std::string View::dtype_name() const {
  return dtype_ == Dtype::other ? other_dtype_ : names[static_cast<int>(dtype_)];
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
    throw std::invalid_argument(std::string(name_) + " has shape " + shape_text() + "; expected (" +
                                text + (expected.size() == 1 ? ",)" : ")"));
  }
  if (contiguous && !has_contiguous_rows())
    throw std::invalid_argument(std::string(name_) +
                                " must have its last dimension contiguous; its stride is " +
                                std::to_string(strides_[dims_ - 1]));
}

std::string View::shape_text() const {
  std::string text = "(";
  for (int dim = 0; dim < dims_; ++dim) text += (dim ? ", " : "") + std::to_string(shape_[dim]);
  return text + (dims_ == 1 ? ",)" : ")");
}

}  // namespace rnnfast

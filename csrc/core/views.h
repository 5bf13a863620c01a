// From views of tensors to the structs of layer.h, once their sizes are checked.
#pragma once

#include <initializer_list>

#include "cpu/dispatch.h"
#include "core/layer.h"
#include "core/errors.h"
#include "core/view.h"

namespace rnnfast {

// Whether kernels compute in this dtype.
constexpr bool is_number(Dtype dtype) {
  return dtype == Dtype::float32 || dtype == Dtype::float64 || dtype == Dtype::bfloat16;
}

// Checks views against expected sizes, and against the dtype of a reference view.
class Checker {
 public:
  explicit Checker(const View& reference) : reference_(reference) {
    if (!is_number(reference.dtype()))
      throw WrongType(std::string(reference.name()) + " has dtype " + reference.dtype_name() +
                      "; expected float32, float64 or bfloat16");
  }

  void shape(const View& view, std::initializer_list<index> expected) const {
    if (!view) return;
    if (view.dtype() != reference_.dtype())
      throw WrongType(std::string(view.name()) + " has dtype " + view.dtype_name() + "; " +
                      reference_.name() + " has " + reference_.dtype_name());
    view.require_shape(expected);
  }

 private:
  const View& reference_;
};

inline const CellInfo& cell_info(int cell) {
  if (cell < 0 || cell >= kernels().cells)
    throw std::invalid_argument("cell " + std::to_string(cell) + " is not in the table of " +
                                std::to_string(kernels().cells) + " cells");
  return kernels().info[cell];
}

inline Dtype number_named(const std::string& name) {
  const Dtype dtype = dtype_named(name);
  if (!is_number(dtype))
    throw std::invalid_argument("dtype is '" + name + "'; expected 'float32', 'float64' or 'bfloat16'");
  return dtype;
}

// Calls f(T{}) with the number type T of a dtype for which is_number() holds.
template <class F>
auto with_numbers(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64:
      return f(double{});
    case Dtype::bfloat16:
      return f(Bfloat16{});
    default:
      return f(float{});
  }
}

inline void require(const View& view) {
  if (!view) throw WrongType(std::string(view.name()) + " must not be None");
}

// Throws where a tensor is not in memory without gaps.
inline void require_dense(const View& view, Dtype dtype, std::initializer_list<index> shape) {
  require(view);
  if (view.dtype() != dtype)
    throw WrongType(std::string(view.name()) + " has the wrong dtype " + view.dtype_name());
  view.require_shape(shape);
  index count = 1, stride = 1;
  for (const index size : shape) count *= size;
  for (int dim = view.dims() - 1; count > 0 && dim >= 0; stride *= view.size(dim--))
    if (view.size(dim) > 1 && view.stride(dim) != stride)
      throw std::invalid_argument(std::string(view.name()) + " is not contiguous");
}

template <class T>
T* vector(const View& view) {
  return static_cast<T*>(view.data());
}

template <class T>
Matrix<T> matrix(const View& view) {
  if (!view) return {};
  return {static_cast<T*>(view.data()), view.stride(0)};
}

}  // namespace rnnfast

// The kernels of one number type and one engine, as the host launches them.
#pragma once

#include "cuda/layout.h"
#include "cuda/plan.h"

namespace rnnfast::cuda {

template <class T>
struct Scalars;
template <class T>
struct TensorCores;

template <class T>
struct CellKernels {
  CellInfo info;
  void (*forward)(Launch<T>);
  void (*backward)(Launch<T>);
};

// The kernels of all cells, in the order of cells.h.
template <class T>
struct NumberKernels {
  int count;
  const CellKernels<T>* cells;
  Sizes sizes;
  EngineShape engine;
};

template <class T, class Engine>  // Scalars or TensorCores
NumberKernels<T> kernels();

}  // namespace rnnfast::cuda

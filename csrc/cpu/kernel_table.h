// The table that one instruction set exports.
#pragma once

#include "cells/info.h"
#include "core/head.h"
#include "core/layer.h"
#include "core/team.h"

namespace rnnfast {

template <class T>
struct CellKernels {
  index (*saved_row)(index hidden);           // numbers in Layer::saved for one row of x
  index (*forward_scratch)(const Layer<T>&);  // bytes
  void (*forward)(const Layer<T>&, const Team&, void* scratch);
  index (*panels_size)(const Layer<T>&);    // numbers in Layer::panels
  void (*pack)(const Layer<T>&);            // the weights into Layer::panels
  int (*backward_groups)(const Layer<T>&);  // groups of rows, see kernels/backward.h
  index (*backward_scratch)(const Layer<T>&, const Gradients<T>&);
  void (*backward)(const Layer<T>&, const Gradients<T>&, const Team&, void* scratch);
  // See kernels/rates.h.
  double (*formula)(bool backward, long rounds);
  index (*step_products_bytes)(index batch, index hidden, int rank, int threads);
  double (*step_products)(index batch, index hidden, int rank, int threads, void* memory, long rounds);
};

// See kernels/head.h.
template <class T>
struct HeadKernels {
  index (*packed_bytes)(const Head<T>&);
  index (*width)(const Head<T>&);  // of a row of scores
  void (*pack)(const Head<T>&);
  index (*scratch)(const Head<T>&);  // bytes, for each part of the product
  void (*multiply)(const Head<T>&, int part, int parts, void* scratch);
  Real<T> (*highest)(const Real<T>* scores, index width);
  Real<T> (*weigh)(const Real<T>* scores, index width, Real<T> highest, Real<T> scale,
                   Real<T>* weights);
  index (*find)(const Real<T>* weights, index width, Real<T> target);
};

// The kernels of one number type. Null where an instruction set has none of its own.
template <class T>
struct NumberKernels {
  const CellKernels<T>* cells;         // in the order of cells.h
  double (*vector_peak)(long rounds);  // see kernels/rates.h; null for float32 in parts
  int matrix_rows;      // rows that the matrix unit multiplies at once; 0: products run on vectors
  HeadKernels<T> head;  // null for float32 in parts
};

struct Kernels {
  const char* name;
  bool emulated;         // for tests: only RNNFAST_ISA and force_isa choose it
  bool (*unit_works)();  // whether its matrix unit computes right; null: it has none to ask
  double (*matrix_peak)(long rounds);  // see kernels/rates.h; null: it has no matrix unit
  void (*read_lines)(const char* data, index bytes, bool descending);
  int vector_bytes;
  int cells;
  const CellInfo* info;
  NumberKernels<float> float32;
  NumberKernels<double> float64;
  NumberKernels<Bfloat16> bfloat16;
  NumberKernels<float> in_parts[3];  // float32 whose products are computed in 1, 2 or 3 bfloat16 parts

  template <class T>
  const NumberKernels<T>& of() const {
    if constexpr (sizeof(T) == 2)
      return bfloat16;
    else if constexpr (sizeof(T) == 4)
      return float32;
    else
      return float64;
  }
  template <class T>
  const NumberKernels<T>& of(const Layer<T>& layer) const {
    if constexpr (sizeof(T) == 4)
      if (layer.parts > 0) return in_parts[layer.parts - 1];
    return of<T>();
  }
  template <class T>
  const CellKernels<T>& of(int cell, const Layer<T>& layer) const {
    return of(layer).cells[cell];
  }
};

}  // namespace rnnfast

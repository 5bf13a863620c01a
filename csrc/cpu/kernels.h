// The table that one instruction set exports.
#pragma once

#include "../layer.h"

namespace rnnfast {

template <class T>
struct CellKernels {
  index (*saved_row)(index hidden);           // numbers in Layer::saved for one row of x
  index (*forward_scratch)(const Layer<T>&);  // bytes
  void (*forward)(const Layer<T>&, const Team&, void* scratch);
  index (*panels_size)(const Layer<T>&);  // numbers in Layer::panels
  void (*pack)(const Layer<T>&);          // the weights into Layer::panels
  index (*backward_scratch)(const Layer<T>&, const Gradients<T>&);
  void (*backward)(const Layer<T>&, const Gradients<T>&, const Team&, void* scratch);
};

struct CellInfo {
  const char* name;
  int weight_blocks;  // G: the gate blocks in torch's weights
  int stages;         // dependent products with the recurrent weights in a step
  bool cell_state, projects;
};

struct Kernels {
  const char* name;
  int vector_bytes;
  int cells;
  const CellInfo* info;
  const CellKernels<float>* float32;
  const CellKernels<double>* float64;
  // Runs independent multiply-adds in registers for `rounds` rounds; returns their operations.
  double (*peak_float32)(long rounds);
  double (*peak_float64)(long rounds);

  template <class T>
  const CellKernels<T>& of(int cell) const;
};

}  // namespace rnnfast

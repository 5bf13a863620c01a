// The definition of kernels(), for the .cu files, each of which compiles it for one number type.
#pragma once

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/kernels.h"

namespace rnnfast::cuda {

template <class Cell, class T, class Engine>
__global__ void __launch_bounds__(block_threads, 1)
    forward_kernel(const __grid_constant__ Launch<T> launch) {
  Forward<Cell, T, Engine>(launch).run();
}

template <class Cell, class T, class Engine>
__global__ void __launch_bounds__(block_threads, 1)
    backward_kernel(const __grid_constant__ Launch<T> launch) {
  Backward<Cell, T, Engine>(launch).run();
}

template <class T, class Engine, class... Cell>
const CellKernels<T>* kernels_of(CellList<Cell...>) {
  static constexpr CellKernels<T> table[] = {
      {info_of<Cell>(), &forward_kernel<Cell, T, Engine>, &backward_kernel<Cell, T, Engine>}...};
  return table;
}

template <class T, class Engine>
NumberKernels<T> kernels() {
  return {Cells::size, kernels_of<T, Engine>(Cells{}), sizes<T, Engine>(),
          EngineShape{Engine::rows, Engine::depth, Engine::columns, Engine::lanes, Engine::most_tiles}};
}

}  // namespace rnnfast::cuda

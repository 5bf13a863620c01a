#include "cuda/instantiate.h"

namespace rnnfast::cuda {

template NumberKernels<Float16> kernels<Float16, TensorCores<Float16>>();

}  // namespace rnnfast::cuda

#include "cuda/instantiate.h"

namespace rnnfast::cuda {

template NumberKernels<float> kernels<float, TensorCores<float>>();

}  // namespace rnnfast::cuda

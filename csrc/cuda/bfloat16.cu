#include "cuda/instantiate.h"

namespace rnnfast::cuda {

template NumberKernels<Bfloat16> kernels<Bfloat16, TensorCores<Bfloat16>>();

}  // namespace rnnfast::cuda

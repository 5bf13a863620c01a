#include "cuda/instantiate.h"

namespace rnnfast::cuda {

template NumberKernels<float> kernels<float, Scalars<float>>();

}  // namespace rnnfast::cuda

#include "cuda/instantiate.h"

namespace rnnfast::cuda {

template NumberKernels<double> kernels<double, Scalars<double>>();

}  // namespace rnnfast::cuda

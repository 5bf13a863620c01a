// Uses C++20, the toolkit's headers and --expt-relaxed-constexpr, as the kernels do.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <concepts>

constexpr int twice(int n) { return 2 * n; }

template <std::integral T>
__global__ void probe(const __grid_constant__ T n, T* out) {
  *out = twice(n);
}

cudaError_t run(int* out) {
  probe<<<1, 1>>>(1, out);
  return cudaGetLastError();
}

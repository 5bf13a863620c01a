// What synchronisation costs on a device, in cycles: the ways that csrc/cuda uses, and others that
// could replace them. It also asks how many clusters are resident. Needs a device with clusters (9.0 or
// later).
//
//     nvcc -O3 -std=c++20 -arch=native -o probe benchmarks/gpu/probe.cu && ./probe
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Ends the program with the action that failed.
void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", action, cudaGetErrorString(status));
  std::exit(1);
}

constexpr int threads = 256, steps = 2000;
// The type of clock() has 64 bits, its counter 32: a difference is right only in 32 bits.
__device__ __forceinline__ unsigned now() { return static_cast<unsigned>(clock()); }
__device__ __forceinline__ unsigned smem(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Mode 0: barrier.cluster release/acquire, nothing stored before. 1: each thread stores 4 global bytes
// before. 2: relaxed arrive (no ordering: the floor of the barrier itself). 3: as 1, the stores between
// arrive and wait.
__global__ void __launch_bounds__(threads, 1) cluster_barrier(int mode, unsigned* out, unsigned* sink) {
  extern __shared__ unsigned char big[];
  const unsigned t0 = now();
  unsigned* mine = sink + (blockIdx.x * threads + threadIdx.x) * 2;
  for (int i = 0; i < steps; ++i) {
    if (mode == 1) mine[i & 1] = i;
    if (mode == 2)
      asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    else
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    if (mode == 3) mine[i & 1] = i;
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  if (threadIdx.x == 0) out[blockIdx.x] = (now() - t0) / steps;
}

// Every block sends `words` 16-byte words to each block of the cluster and waits for all of theirs.
// Mode 0: ordinary stores, then barrier.cluster (csrc/cuda). 1: st.async that counts on the receiver's
// mbarrier.
__global__ void __launch_bounds__(threads, 1)
    exchange(int mode, int words, unsigned* out, unsigned* sink) {
  extern __shared__ __align__(16) unsigned char memory[];
  uint4* buffer = reinterpret_cast<uint4*>(memory);  // [2][blocks][words]
  __shared__ __align__(8) unsigned long long bar[2];
  unsigned blocks, rank;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const unsigned bytes = blocks * words * 16;
  if (threadIdx.x == 0)
    for (int b = 0; b < 2; ++b) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(&bar[b])) : "memory");
    }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  if (mode == 1 && threadIdx.x == 0)
    for (int b = 0; b < 2; ++b)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(&bar[b])),
                   "r"(bytes)
                   : "memory");
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
  unsigned sum = 0;
  const unsigned t0 = now();
  for (int i = 0; i < steps; ++i) {
    const int p = i & 1;
    for (int k = threadIdx.x; k < static_cast<int>(blocks) * words; k += threads) {
      const unsigned to = k / words, w = k % words;
      uint4* here = buffer + (p * blocks + rank) * words + w;
      unsigned there;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem(here)), "r"(to));
      if (mode == 0) {
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(there), "r"(i + sum)
                     : "memory");
      } else {
        unsigned remote;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                     : "=r"(remote)
                     : "r"(smem(&bar[p])), "r"(to));
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%1,%1,%1}, "
            "[%2];" ::"r"(there),
            "r"(i + sum), "r"(remote)
            : "memory");
      }
    }
    if (mode == 0) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                       : "memory");
    } else {
      asm volatile(
          "{\n.reg .pred q;\nW: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 q, [%0], "
          "%1;\n@!q bra W;\n}" ::"r"(smem(&bar[p])),
          "r"((i >> 1) & 1)
          : "memory");
      if (threadIdx.x ==
          0)  // for the use after next, which no block reaches before all have sent the next
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(&bar[p])),
                     "r"(bytes)
                     : "memory");
    }
    sum += buffer[p * blocks * words + threadIdx.x % (blocks * words)].x & 1;
    if (mode == 1) __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = (now() - t0) / steps;
  sink[blockIdx.x * threads + threadIdx.x] = sum;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// Mode 0: csrc/cuda's meet(). 1: red.release, relaxed polling, one fence. 2: flags in the data: every
// block writes 16 bytes with the step in one word, and reads those of all blocks until they have it.
__global__ void __launch_bounds__(threads, 1)
    grid_meet(int mode, unsigned* counter, uint4* box, unsigned* out, unsigned* sink) {
  unsigned met = 0, sum = 0;
  const unsigned t0 = now();
  for (int i = 1; i <= steps; ++i) {
    if (mode < 2) {
      sink[(blockIdx.x * threads + threadIdx.x) * 2 + (i & 1)] = i;
      met += gridDim.x;
      __syncthreads();
      if (threadIdx.x == 0) {
        unsigned seen;
        if (mode == 0) {
          asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter)
                       : "memory");
          do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
          while (static_cast<int>(seen - met) < 0);
        } else {
          asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
          do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
          while (static_cast<int>(seen - met) < 0);
          asm volatile("fence.acq_rel.gpu;" ::: "memory");
        }
      }
      __syncthreads();
    } else {
      uint4* to = box + (i & 1) * gridDim.x;
      if (threadIdx.x == 0)
        asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(to + blockIdx.x), "r"(i)
                     : "memory");
      for (unsigned b = threadIdx.x; b < gridDim.x; b += threads) {
        unsigned v;
        do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(&to[b].x) : "memory");
        while (v != static_cast<unsigned>(i));
        sum += v;
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) out[blockIdx.x] = (now() - t0) / steps;
  sink[blockIdx.x * threads + threadIdx.x] = sum;
}

unsigned *out, *sink, *counter;
uint4* box;
unsigned host[1024];
constexpr int shared_bytes = 200 << 10;  // so that a multiprocessor has one block

int slowest(int blocks) {
  check(cudaDeviceSynchronize(), "waiting for a kernel");
  check(cudaMemcpy(host, out, sizeof(unsigned) * blocks, cudaMemcpyDeviceToHost), "copying times");
  return static_cast<int>(*std::max_element(host, host + blocks));
}

cudaLaunchConfig_t config_of(cudaLaunchAttribute& cluster, int size, int clusters) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = size * clusters;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// How many clusters of this size are resident; 0 where the device has none.
template <class... P>
int resident(void (*kernel)(P...), int size) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "allowing shared memory");
  check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "allowing large clusters");
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(cluster, size, 1);
  int most = 0;
  if (cudaOccupancyMaxActiveClusters(&most, function, &config) == cudaSuccess) return most;
  cudaGetLastError();
  return 0;
}

// The cycles of a step of the slowest block.
template <class... P, class... A>
int clustered(void (*kernel)(P...), int size, int clusters, A... arguments) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(cluster, size, clusters);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), "launching clusters");
  return slowest(size * clusters);
}

int main() {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, 0), "asking for the device");
  std::printf("%s: %d multiprocessors, L2 %d MB, %zu KB of shared memory a block\n", p.name,
              p.multiProcessorCount, p.l2CacheSize >> 20, p.sharedMemPerBlockOptin >> 10);
  check(cudaMalloc(&out, 4096), "allocating");
  check(cudaMalloc(&sink, 4 << 20), "allocating");
  check(cudaMalloc(&counter, 4096), "allocating");
  check(cudaMalloc(&box, 1 << 20), "allocating");
  for (int size : {2, 4, 8, 16}) {
    const int most = std::min(resident(cluster_barrier, size), resident(exchange, size));
    std::printf("clusters of %2d: %d are resident, the multiprocessors are enough for %d\n", size, most,
                p.multiProcessorCount / size);
    if (most < 1) continue;
    std::printf(
        "  cycles of a barrier: %d; after global stores %d, without order %d, stores between %d\n",
        clustered(cluster_barrier, size, most, 0, out, sink),
        clustered(cluster_barrier, size, most, 1, out, sink),
        clustered(cluster_barrier, size, most, 2, out, sink),
        clustered(cluster_barrier, size, most, 3, out, sink));
    for (int words : {4, 16, 64}) {
      if (2 * size * words * 16 > shared_bytes) continue;
      std::printf("  %2d words to all: stores and barrier %d, st.async and mbarrier %d\n", words,
                  clustered(exchange, size, most, 0, words, out, sink),
                  clustered(exchange, size, most, 1, words, out, sink));
    }
  }
  for (int blocks = 32; blocks <= std::min(128, p.multiProcessorCount); blocks *= 2) {
    int cycles[3];
    for (int mode = 0; mode < 3; ++mode) {
      check(cudaMemset(counter, 0, 4096), "clearing");
      check(cudaMemset(box, 0, 1 << 20), "clearing");
      void* arguments[] = {&mode, &counter, &box, &out, &sink};
      check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_meet), blocks, threads, arguments,
                                        0, 0),
            "launching a grid");
      cycles[mode] = slowest(blocks);
    }
    std::printf("grid of %3d: meet() %d, red.release and relaxed polls %d, flags in data %d\n", blocks,
                cycles[0], cycles[1], cycles[2]);
  }
}

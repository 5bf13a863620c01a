// All that the kernels use of the device: no other file names a CUDA builtin. The tests replace these
// functions by an emulator, whose threads take turns on the CPU.
#pragma once

#include "cuda/recurrence.h"

#if defined(RNNFAST_EMULATED)
#include "emulator.h"
#else

#include <cuda_fp16.h>

namespace rnnfast::cuda {

RNNFAST_INLINE int thread() { return static_cast<int>(threadIdx.x); }
RNNFAST_INLINE int threads() { return static_cast<int>(blockDim.x); }
RNNFAST_INLINE int block() { return static_cast<int>(blockIdx.x); }

// The block's dynamic shared memory.
RNNFAST_INLINE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

RNNFAST_INLINE void sync_block() { __syncthreads(); }

// Waits for the blocks of the cluster; what they wrote before is then visible.
RNNFAST_INLINE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __trap();  // code for a device without clusters never gets here
#endif
}

// Maps an address in this block's shared memory to the shared memory of block `rank` of the cluster.
template <class T>
RNNFAST_INLINE T* shared_of(T* address, int rank) {
#if __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(address), "r"(rank));
  return mapped;
#else
  __trap();
  return address;
#endif
}

// Adds 1 to a counter in device memory. A thread that waits for it then sees what this thread wrote
// before, and what this thread saw.
RNNFAST_INLINE void count(unsigned* counter) {
  asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits until the counter has reached `target`.
RNNFAST_INLINE void wait_for(const unsigned* counter, unsigned target) {
  unsigned seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (static_cast<int>(seen - target) < 0);
}

struct alignas(16) Words {
  unsigned word[4];
};

// Loads from device memory that another block has just written: not from this multiprocessor's L1
// cache.
RNNFAST_INLINE Words load_fresh(const Words* from) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
RNNFAST_INLINE float load_fresh(const float* from) { return __ldcg(from); }
RNNFAST_INLINE double load_fresh(const double* from) { return __ldcg(from); }

RNNFAST_INLINE float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
RNNFAST_INLINE Float16 narrow_to_half(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

// D = A B + D on a warp's tensor cores: A is 16 by k in rows, B k by 8 in columns, k = 32 bytes of a
// row. For the elements of each lane see PTX ISA, "Matrix fragments for mma.m16n8k16" and
// "mma.m16n8k8". Volatile: the lanes of a warp must execute it together, and the compiler may move
// other asm statements below a condition.
RNNFAST_INLINE void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                  Bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
RNNFAST_INLINE void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                  Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The operands are TF32: the device reads the upper 19 bits of a float.
RNNFAST_INLINE void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                  float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Rounds to nearest TF32.
RNNFAST_INLINE unsigned to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace rnnfast::cuda

#endif

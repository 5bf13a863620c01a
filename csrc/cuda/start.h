// All that the host asks of the device: its properties, launches, and the memory that launches need.
// The caller makes the device current: torch's guard does it, and a device that a program does not use
// gets no context. The tests compile this file with a runtime of their own, which records the calls.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/plan.h"
#include "cuda/recurrence.h"

namespace rnnfast::cuda {

struct Stream {
  int device;
  void* handle;
};

// The device or its driver cannot run a kernel. Nothing has happened, and the caller has another way.
class Refused : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Whether an error means that the device or its driver cannot run what was asked, and that nothing else
// is wrong.
inline bool is_refusal(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorInvalidClusterSize:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNotSupported:
    case cudaErrorNotPermitted:
      return true;
    default:
      return false;
  }
}

inline void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call that asks for it would report it
  const std::string message =
      std::string(action) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
  if (is_refusal(status)) throw Refused(message);
  throw std::runtime_error("rnnfast: " + message);
}

#if defined(RNNFAST_EMULATED)
inline constexpr Place memory_place = Place::cpu;
#else
inline constexpr Place memory_place = Place::cuda;
#endif

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for the properties of the device");
  return value;
}

inline Device facts(int device) {
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
              attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

// Tensor cores of bfloat16 and TF32, and copies of this size to shared memory, exist from 8.0 on.
inline constexpr int least_capability = 80;

inline void require_capability(const Device& device) {
  if (device.capability < least_capability)
    throw Refused("the compute capability is " + std::to_string(device.capability / 10) + "." +
                  std::to_string(device.capability % 10) + "; the kernels need 8.0 or later");
}

inline void require_current(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != device)
    throw Refused("the current CUDA device is " + std::to_string(current) + "; the tensors are on " +
                  std::to_string(device));
}

// Gives a kernel all the shared memory that a block of the current device can have, and clusters of
// more than 8 blocks. Attributes are the process's, and another thread may launch the kernel with
// another plan: so they are set once, and never to what one plan needs.
inline void allow_all(const void* kernel, int number, const Device& device) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.count({number, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes),
        "allowing a kernel all shared memory");
  if (device.capability >= 90)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "allowing a kernel large clusters");
  allowed.insert({number, kernel});
}

inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// What the current device holds of a kernel at once. Only the device can say it: a part of it may be
// broken, reserved for another process, or not connected to the rest as a cluster needs it.
inline Residency residency_of(const void* kernel, int number, const Device& device) {
  Residency residency{};
  if (attribute(cudaDevAttrCooperativeLaunch, number)) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block_threads,
                                                        static_cast<std::size_t>(device.shared_bytes)),
          "asking how many blocks are resident");
    residency.blocks = blocks > 0 ? device.multiprocessors : 0;
  }
  if (device.capability < 90 || !attribute(cudaDevAttrClusterLaunch, number)) return residency;
  for (std::size_t i = 0; i < std::size(cluster_sizes); ++i) {
    cudaLaunchAttribute cluster = cluster_of(cluster_sizes[i]);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(cluster_sizes[i]));
    config.blockDim = dim3(block_threads);
    config.dynamicSmemBytes = static_cast<std::size_t>(device.shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&residency.clusters[i], kernel, &config);
    if (is_refusal(status)) {  // the device has no clusters of this size
      cudaGetLastError();
      residency.clusters[i] = 0;
    } else {
      check(status, "asking how many clusters are resident");
    }
  }
  return residency;
}

inline void zero(void* memory, std::int64_t bytes, const Stream& stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes),
                        static_cast<cudaStream_t>(stream.handle)),
        "clearing counters");
}

template <class T>
std::string text_of(const Launch<T>& launch) {
  const Recurrence<T>& layer = launch.direction[0];
  const Plan& plan = launch.plan;
  return "launching a recurrence of T=" + std::to_string(layer.steps) +
         ", B=" + std::to_string(layer.batch) + ", H=" + std::to_string(layer.hidden) + " on tier " +
         name_of(plan.tier) + ", groups of " + std::to_string(plan.blocks) + " blocks with " +
         std::to_string(plan.shared_bytes) + " bytes of shared memory each";
}

// Launches a kernel for which allow_all was called.
template <class T>
void start(void (*kernel)(Launch<T>), const Launch<T>& launch, const Stream& stream) {
  const Plan& plan = launch.plan;
  cudaLaunchAttribute how{};
  if (plan.tier == Tier::cluster) {
    how = cluster_of(plan.blocks);
  } else if (plan.tier == Tier::grid) {
    how.id = cudaLaunchAttributeCooperative;
    how.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.groups * plan.blocks * launch.directions));
  config.blockDim = dim3(block_threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &how;
  config.numAttrs = plan.tier == Tier::block ? 0 : 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, launch);
  if (status == cudaSuccess) return;
  // A device refuses many layers for one reason, of which the user is warned once: so without sizes.
  check(status, is_refusal(status) ? "launching a recurrence" : text_of(launch).c_str());
}

}  // namespace rnnfast::cuda

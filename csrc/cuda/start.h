// All that the host asks of the device: its properties, launches, and the memory that launches need.
#pragma once

#include "cuda/plan.h"
#include "cuda/recurrence.h"

#if defined(RNNFAST_EMULATED)
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rnnfast::cuda {

struct Stream {
  int device;
  void* handle;
};

inline void check(cudaError_t status, const std::string& action) {
  if (status != cudaSuccess)
    throw std::runtime_error(action + " failed: " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
}

inline constexpr Place memory_place = Place::cuda;

inline Device facts(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device),
          "rnnfast: asking about CUDA device " + std::to_string(device));
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  const bool clusters = major >= 9 && attribute(cudaDevAttrClusterLaunch);
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          // A cluster can have 16 blocks on data-centre GPUs where a kernel allows it, otherwise 8.
          clusters ? (major < 12 ? 16 : 8) : 1, attribute(cudaDevAttrCooperativeLaunch) != 0};
}

// Makes `device` the calling thread's current device until it goes out of scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The caller may free or change `from` at once.
inline void copy_to_device(void* to, const void* from, std::int64_t bytes, const Stream& stream) {
  const OnDevice current(stream.device);
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  cudaStreamCaptureStatus capturing{};
  check(cudaStreamIsCapturing(handle, &capturing), "cudaStreamIsCapturing");
  if (capturing != cudaStreamCaptureStatusNone)
    throw std::runtime_error(
        "rnnfast: a packed sequence cannot be captured in a CUDA graph, since its lengths are in the "
        "host's memory; pad the batch");
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, handle),
        "rnnfast: copying the lengths of a packed sequence");
}

inline void zero(void* memory, std::int64_t bytes, const Stream& stream) {
  const OnDevice current(stream.device);
  check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes),
                        static_cast<cudaStream_t>(stream.handle)),
        "rnnfast: clearing counters");
}

template <class T>
void start(void (*kernel)(Launch<T>), const Launch<T>& launch, const Stream& stream) {
  const Plan& plan = launch.plan;
  const Recurrence<T>& layer = launch.direction[0];
  const OnDevice current(stream.device);
  const std::string action = "rnnfast: a recurrence of T=" + std::to_string(layer.steps) +
                             ", B=" + std::to_string(layer.batch) +
                             ", H=" + std::to_string(layer.hidden) + " on tier " + name_of(plan.tier) +
                             ", groups of " + std::to_string(plan.blocks) + " blocks with " +
                             std::to_string(plan.shared_bytes) +
                             " bytes of shared memory each (RNNFAST_CUDA_TIER chooses another tier)";
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
        action);
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.groups * plan.blocks * launch.directions));
  config.blockDim = dim3(block_threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = plan.tier == Tier::block ? 0 : 1;
  if (plan.tier == Tier::cluster) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(plan.blocks);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    if (plan.blocks > 8)  // 8 are possible on every device with clusters
      check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), action);
  } else if (plan.tier == Tier::grid) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, launch), action);
}

}  // namespace rnnfast::cuda

#endif

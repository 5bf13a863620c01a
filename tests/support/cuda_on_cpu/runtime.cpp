#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include <cuda_runtime.h>

using rnnfast::cuda::Emulator;

namespace {

// What a test has chosen: properties of the device by name, and an error for the name of a function.
std::map<std::string, int> chosen;
std::string calls;  // one line for each call
cudaError_t last_error = cudaSuccess;
std::map<const void*, std::map<cudaFuncAttribute, int>> attributes;

int choice(const std::string& name, int otherwise) {
  const auto found = chosen.find(name);
  return found == chosen.end() ? otherwise : found->second;
}

// A small device with clusters. RNNFAST_EMULATED_MULTIPROCESSORS changes its size.
int multiprocessors() {
  const char* number = std::getenv("RNNFAST_EMULATED_MULTIPROCESSORS");
  return choice("multiprocessors", number ? std::atoi(number) : 12);
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

// Records a call. Its result is the error that the test has chosen for it, if any.
cudaError_t called(const std::string& function, const std::string& arguments = "") {
  calls += function + "(" + arguments + ")\n";
  const int error = choice(function, cudaSuccess);
  return error ? fail(static_cast<cudaError_t>(error)) : cudaSuccess;
}

std::string text(std::size_t n) { return std::to_string(n); }

}  // namespace

// The controls of a test; see __init__.py.
#define CONTROL extern "C" __attribute__((visibility("default")))
CONTROL void emulated_choose(const char* name, int value) { chosen[name] = value; }
CONTROL const char* emulated_calls() { return calls.c_str(); }
CONTROL void emulated_reset() {
  chosen.clear();
  calls.clear();
  last_error = cudaSuccess;
}
CONTROL int emulated_last_error() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  static std::string name;
  name = "error " + std::to_string(error);
  return name.c_str();
}

const char* cudaGetErrorString(cudaError_t) { return "as the test has chosen"; }

cudaError_t cudaGetDevice(int* device) {
  *device = choice("current device", 0);
  return called("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) { return called("cudaSetDevice", text(device)); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = choice("capability", 90) / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = choice("capability", 90) % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = choice("shared bytes", 227 << 10);
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = choice("cooperative", 1);
      break;
    case cudaDevAttrClusterLaunch:
      *value = choice("clusters", 1);
      break;
  }
  return called("cudaDeviceGetAttribute", text(attribute) + ", " + text(device));
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const cudaError_t error =
      called("cudaFuncSetAttribute",
             (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? "shared bytes, "
                                                                       : "large clusters, ") +
                 text(value));
  if (error == cudaSuccess) attributes[kernel][attribute] = value;
  return error;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          std::size_t shared_bytes) {
  *blocks = choice("blocks of a multiprocessor", 1);
  if (static_cast<int>(shared_bytes) > attributes[kernel][cudaFuncAttributeMaxDynamicSharedMemorySize])
    *blocks = 0;
  return called("cudaOccupancyMaxActiveBlocksPerMultiprocessor",
                text(threads) + ", " + text(shared_bytes));
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  if (size > 8 && !attributes[kernel][cudaFuncAttributeNonPortableClusterSizeAllowed])
    return fail(cudaErrorInvalidClusterSize);
  *clusters = choice("clusters of " + std::to_string(size), multiprocessors() / size);
  return called("cudaOccupancyMaxActiveClusters", text(size));
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  const cudaError_t error = called("cudaMemsetAsync", text(bytes));
  if (error == cudaSuccess) std::memset(memory, value, bytes);
  return error;
}

// Groups that need not be resident together run one after the other.
cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const void* kernel,
                            const std::function<void()>& body) {
  const int blocks = static_cast<int>(config.gridDim.x);
  int together = 1;
  std::string how = "blocks";
  if (config.numAttrs > 0 && config.attrs[0].id == cudaLaunchAttributeCooperative) {
    how = "cooperative";
    together = blocks;
  } else if (config.numAttrs > 0) {
    together = static_cast<int>(config.attrs[0].val.clusterDim.x);
    how = "clusters of " + std::to_string(together);
  }
  const cudaError_t error =
      called("cudaLaunchKernelEx", how + ", " + text(blocks) + ", " + text(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  const int shared_bytes = static_cast<int>(config.dynamicSmemBytes);
  if (shared_bytes > attributes[kernel][cudaFuncAttributeMaxDynamicSharedMemorySize])
    return fail(cudaErrorInvalidValue);
  if (how == "cooperative" && blocks > multiprocessors())
    return fail(cudaErrorCooperativeLaunchTooLarge);
  if (how != "cooperative" && together > 8 &&
      !attributes[kernel][cudaFuncAttributeNonPortableClusterSizeAllowed])
    return fail(cudaErrorInvalidClusterSize);
  if (blocks % together != 0) return fail(cudaErrorInvalidConfiguration);
  for (int first = 0; first < blocks; first += together)
    Emulator(first, together, static_cast<int>(config.blockDim.x), shared_bytes, ++Emulator::seed)
        .run(body);
  return cudaSuccess;
}

// Launching: one way for every kernel, and a Status that says which kernel, on which shapes, failed why.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <initializer_list>
#include <string>

#include "fastnn/cuda.h"

namespace fastnn::cuda {

struct Device {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 1;
  int shared_bytes = 49152;  // the most that a block may have
};

inline Device current_device() {
  Device device;
  int ordinal = 0, major = 0, minor = 0;
  cudaGetDevice(&ordinal);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  device.capability = 10 * major + minor;
  return device;
}

// Whether a kernel that only some architectures have a body for has one here: where a build left that architecture out,
// what is loaded is the empty kernel of another, which needs next to no registers.
template <class... Parameters>
bool has_body(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess)
    return attributes.numRegs > 32;
  cudaGetLastError();  // it is answered here and must not be found by the next call
  return false;
}

// A kernel's name and the sizes it works on, for the message of a launch that failed.
struct Label {
  const char* kernel;
  struct Size {
    const char* name;
    int64_t value;
  };
  std::initializer_list<Size> sizes;
};

inline Status failed(const Label& label, cudaError_t error, const std::string& reason) {
  std::string text = label.kernel;
  for (const auto& size : label.sizes) text += std::string(" ") + size.name + "=" + std::to_string(size.value);
  Status status;
  status.error = static_cast<int>(error);
  std::snprintf(status.message, sizeof status.message, "%s: %s", text.c_str(), reason.c_str());
  return status;
}

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
Status launch(const Label& label, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
              Stream stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 49152)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // it is reported here and must not be found again by the next call
  return failed(label, error,
                "grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" + std::to_string(grid.z) +
                    " of " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                    " bytes of shared memory: " + cudaGetErrorString(error));
}

}  // namespace fastnn::cuda

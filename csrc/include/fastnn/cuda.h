// What a call of a CUDA kernel takes along and brings back. No CUDA header is needed to include this.
#pragma once

#include <cstdint>

struct CUstream_st;  // what CUDA's cudaStream_t points to

namespace fastnn::cuda {

using Stream = CUstream_st*;

// Memory of the device, from the caller's allocator. A call asks for what its plan needs, at once, before it launches
// anything; what an earlier call of `allocate` gave is then no longer needed.
struct Workspace {
  void* (*allocate)(void* caller, int64_t bytes);  // aligned to 256 bytes
  void* caller;
  void* operator()(int64_t bytes) const { return bytes > 0 ? allocate(caller, bytes) : nullptr; }
};

// What became of a launch. Kernels run later, so an error inside one is not seen here.
struct Status {
  int error = 0;           // cudaError_t
  char message[256] = "";  // the kernel, its shapes, its launch and CUDA's reason
  bool ok() const { return error == 0; }
};

}  // namespace fastnn::cuda

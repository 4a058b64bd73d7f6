// What a call of a CUDA kernel takes along and brings back. No CUDA header is needed to include this.
#pragma once

#include <cstdint>

struct CUstream_st;  // what CUDA's cudaStream_t points to

namespace fastnn::cuda {

using Stream = CUstream_st*;

// Memory of the device, from the caller's allocator; an op's <op>_workspace tells how many bytes a call needs.
struct Workspace {
  void* data = nullptr;  // aligned to 16 bytes
  int64_t bytes = 0;
};

// What became of a launch. Kernels run later, so an error inside one is not seen here.
struct Status {
  int error = 0;           // cudaError_t
  char message[256] = "";  // the kernel, its shapes, its launch and CUDA's reason
  bool ok() const { return error == 0; }
};

}  // namespace fastnn::cuda

// The descriptor that TMA copies by: a tensor of up to five dimensions and the box that one copy moves, in shared memory
// always with the 128-byte swizzle: rows of 128 bytes, chunk c of 16 bytes at place c ^ (r mod 8), r = address / 128.
// A kernel takes it as (a member of) a `__grid_constant__ const` parameter.
#pragma once

#include <cuda_runtime.h>
#if !defined(FASTNN_CUDA_SHIM)
#include <cuda.h>  // types alone: nothing links to libcuda
#endif

#include <cstdint>

#include "fastnn/types.h"

namespace fastnn::cuda {

#if defined(FASTNN_CUDA_SHIM)
using TensorMap = host::TensorMap;
#else
struct TensorMap {
  CUtensorMap map;  // aligned as TMA wants it
};
#endif

// Describes the tensor at `data`, dimension 0 the one whose elements lie next to each other: `sizes` in elements,
// `strides` of all dimensions in bytes (the first is an element's size; that of a dimension of one element has no
// meaning), `box` in elements, 128 bytes of dimension 0 and at most 256 of the others. What a load reads outside of the
// sizes is zero, what a store writes there is dropped. False where TMA cannot describe it or the driver will not.
inline bool encode_tensor_map(TensorMap& map, DType dtype, const void* data, int rank, const int64_t* sizes,
                              const int64_t* strides, const int* box) {
  const int element = dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
  if (rank < 2 || rank > 5 || reinterpret_cast<uintptr_t>(data) % 16 || data == nullptr) return false;
  int64_t pitch[5] = {element};
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] >= int64_t{1} << 32 || box[i] < 1 || box[i] > 256) return false;
    const bool meaningless = sizes[i] == 1;
    if (i > 0) pitch[i] = meaningless ? 16 : strides[i];
    if (i == 0 && !meaningless && strides[0] != element) return false;
    if (i > 0 && (pitch[i] <= 0 || pitch[i] % 16 || pitch[i] >= int64_t{1} << 40)) return false;
  }
  if (box[0] * element != 128) return false;
#if defined(FASTNN_CUDA_SHIM)
  map.data = const_cast<void*>(data), map.rank = rank, map.element = element;
  for (int i = 0; i < rank; ++i) map.sizes[i] = sizes[i], map.strides[i] = pitch[i], map.box[i] = box[i];
  return !host::machine.no_driver;
#else
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    if (error != cudaSuccess) cudaGetLastError();  // it is answered here and must not be found by the next call
    return there ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  if (!encode) return false;
  cuuint64_t dims[5], steps[5];
  cuuint32_t boxes[5], ones[5];
  for (int i = 0; i < rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]), boxes[i] = static_cast<cuuint32_t>(box[i]), ones[i] = 1;
    if (i > 0) steps[i - 1] = static_cast<cuuint64_t>(pitch[i]);
  }
  const CUtensorMapDataType type = dtype == DType::Float64    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT64
                                   : dtype == DType::Float32  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(&map.map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(data), dims, steps, boxes, ones,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#endif
}

}  // namespace fastnn::cuda

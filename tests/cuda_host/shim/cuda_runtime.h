// Stands in for CUDA's header where g++ compiles the kernels of csrc/cuda, to run them on the CPU: see execute.cpp.
#pragma once

#define FASTNN_CUDA_SHIM 1

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the runtime's functions that csrc/cuda calls -------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int numRegs;
};
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

// ---- what kernels run on --------------------------------------------------------------------------------------------

namespace fastnn::cuda::host {

// The device that is played, and the order in which threads and blocks run; tests set them.
struct Machine {
  int capability = 80, multiprocessors = 4, shared_bytes = 101376;
  enum Order { Forward, Backward, Shuffled } order = Forward;
  bool no_driver = false;  // that encodes a tensor map
  bool no_body = false;    // in kernels that only some architectures have one for
};
inline Machine machine;
inline int64_t launches = 0, wgmmas = 0;  // since the start

cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t execute(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);

unsigned char* dynamic_shared();
void shared_load(void* value, const void* from, int bytes);
void shared_store(void* to, const void* value, int bytes);

void cp_async(void* to, const void* from, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half);
void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m8n8k4_f64(double (&c)[2], double a, double b);

// sm_90a, see sm90.cpp.
struct alignas(64) TensorMap {
  void* data;
  int rank, element;  // bytes of an element
  int64_t sizes[5], strides[5];
  int box[5];
};
void mbarrier_init(uint64_t* bar, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* bar, int bytes);
void mbarrier_wait(uint64_t* bar, int parity);
void named_barrier(int id, int threads, bool waits);
void registers(int count);
void fence_async();
void tma_load(void* to, const TensorMap* map, uint64_t* bar, const int* at, int rank);
void tma_store(const TensorMap* map, const void* from, const int* at, int rank);
void tma_store_commit();
void tma_store_wait(int pending);
uint32_t shared_offset(const void* pointer);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool a_along_k, bool b_along_k,
           bool half, bool accumulate);

[[noreturn]] void trap();
float exp2_approximate(float x);
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
void shuffle(void* value, int bytes, int source_lane, const char* file, int line);  // value of source_lane
int lane();

}  // namespace fastnn::cuda::host

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fastnn::cuda::host::barrier(file, line);
}
inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fastnn::cuda::host::warp_barrier(file, line);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fastnn::cuda::host::shuffle(&value, sizeof value, source & 31, file, line);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fastnn::cuda::host::shuffle(&value, sizeof value, fastnn::cuda::host::lane() ^ mask, file, line);
  return value;
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  for (int apart = 16; apart > 0; apart /= 2) predicate |= __shfl_xor_sync(mask, predicate, apart, file, line);
  return predicate;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return fastnn::cuda::host::allow_shared(reinterpret_cast<const void*>(kernel), value);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return fastnn::cuda::host::execute(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(arguments...); });
}

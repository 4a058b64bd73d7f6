// How a binding calls a CUDA kernel: on the tensor's device, on its current stream, with a workspace from torch's allocator.
// Only device-generic parts of c10: this compiles against any torch, and is used where FASTNN_CUDA says that kernels exist.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bindings/checks.h"
#include "fastnn/cuda.h"

namespace fastnn::bindings {

#ifdef FASTNN_CUDA
inline constexpr bool kCuda = true;
#else
inline constexpr bool kCuda = false;
#endif

// Whether a tensor belongs to the CUDA kernels of an op that has them.
inline bool on_cuda(const Tensor& t) { return kCuda && t.is_cuda(); }

// served, of an op that has CUDA kernels too.
inline bool served_on_cuda(const Tensor& t) {
  return served(t) || (on_cuda(t) && t.layout() == at::kStrided && dtype_of(t) && !t.is_nested() && !t.is_neg());
}
inline bool served_on_cuda(const OptionalTensor& t) { return !t || !t->defined() || served_on_cuda(*t); }

// run(workspace, stream), on the device of `like`.
template <class Run>
void call_cuda(const char* op, const Tensor& like, const Run& run) {
  const c10::DeviceGuard guard(like.device());
  const c10::Stream stream = c10::impl::VirtualGuardImpl(like.device().type()).getStream(like.device());
  struct Memory {
    const Tensor& like;
    Tensor given;  // handed back at the end: the allocator gives it to nothing but what this stream runs later
  } memory = {like, {}};
  const cuda::Workspace workspace = {[](void* caller, int64_t bytes) {
                                       Memory& m = *static_cast<Memory*>(caller);
                                       m.given = at::empty({bytes}, m.like.options().dtype(at::kByte));
                                       return m.given.mutable_data_ptr();
                                     },
                                     &memory};
  const cuda::Status status = run(workspace, static_cast<cuda::Stream>(stream.native_handle()));
  TORCH_CHECK(status.ok(), "fastnn.", op, ": ", status.message);
}

}  // namespace fastnn::bindings

// What the bindings of conv2d share: conv2d_check.cpp asks whether the arguments fit and chooses the algorithm, conv2d.cpp
// allocates and calls the kernels, conv2d_autograd.cpp differentiates.
#pragma once

#include <array>
#include <atomic>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "fastnn/conv2d.h"

namespace fastnn::bindings {

using at::IntArrayRef;
using Name = std::optional<std::string_view>;

extern std::optional<Conv2dAlgorithm> forced_conv2d;  // by tests
extern std::atomic<bool> winograd_allowed;            // fastnn.backends.winograd

// A checked call: input with four dimensions, shape of the problem. padding is top, bottom, left, right.
struct Conv2dProblem {
  Tensor input;         // [N, C, H, W]
  OptionalTensor bias;  // [K], contiguous
  bool batched;
  Conv2dShape shape;
  at::MemoryFormat format;
  std::vector<int64_t> output_shape;  // with N
};

Conv2dProblem check_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, int64_t groups);

// Double precision is for those who want its digits: Winograd only where a test asks for it.
inline bool winograd_suits(DType dtype) { return dtype != DType::Float64 || forced_conv2d; }
// The rule, or what a test forces where it fits. frozen: the filter is packed before the call.
Conv2dAlgorithm choose(const Conv2dShape& s, bool winograd, bool frozen);
Conv2dAlgorithm choose(const Conv2dProblem& q, const Tensor& weight, bool frozen);
Conv2dAlgorithm conv2d_algorithm_named(std::string_view name);

// The params that packing reads, and the shape of what it makes: [size] in NCHW; three dimensions for channels_last, five
// for Winograd, so that layouts, algorithms and, for Winograd, ISAs cannot be taken for one another.
Conv2dParams pack_params(IntArrayRef weight_sizes, DType dtype, int64_t groups, bool channels_last, Name algorithm);
std::vector<int64_t> packed_shape(const Conv2dParams& p);

// The CPU kernels of the ops; their types are the ops' schemas.
Tensor conv2d_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                  IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation,
                  const OptionalTensor& packed);
std::tuple<Tensor, Tensor> conv2d_train_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                            int64_t groups, Name activation);
std::tuple<Tensor, Tensor, Tensor> conv2d_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& saved, IntArrayRef stride,
                                                       IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                                       Name activation, std::array<bool, 3> output_mask);

// The op, through the dispatcher.
Tensor call_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation,
                   const OptionalTensor& packed);

}  // namespace fastnn::bindings

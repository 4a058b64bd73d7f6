// 2-D convolution: the contract between the bindings and the kernels.
//
//   output[n, k, oy, ox] = f(bias[k] + sum over c, r, s of
//       input[n, k / (K / groups) * (C / groups) + c, oy * stride_h + r * dilation_h - pad_top, ox * stride_w + s * dilation_w - pad_left]
//       * weight[k, c, r, s]),   input read as zero outside the image.
#pragma once

#include <cstdint>

#include "fastnn/types.h"

namespace fastnn {

// Pointwise: 1x1 without stride or padding, the image is one row of pixels. Implicit: GEMM whose patches are gathered
// while packing. Direct: few channels a group (depthwise and its kin), no GEMM.
enum class Conv2dAlgorithm : int32_t { Pointwise, Implicit, Direct };
inline constexpr const char* kConv2dAlgorithmNames[] = {"pointwise", "implicit", "direct"};

struct Conv2dShape {
  int64_t N, C, H, W;  // input
  int64_t K, R, S;     // weight
  int64_t OH, OW;      // output
  int64_t groups;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // the bottom and right padding show in OH and OW only
  int64_t dilation_h, dilation_w;
  bool channels_last;  // memory format of input (last stride 1 in channels), output and their gradients

  int64_t group_in() const { return C / groups; }
  int64_t group_out() const { return K / groups; }
  bool pointwise() const {
    return R == 1 && S == 1 && stride_h == 1 && stride_w == 1 && pad_top == 0 && pad_left == 0 && OH == H && OW == W;
  }
};

// The rule that chooses, in one place; the number of threads has no say in it. A group with few channels leaves a GEMM
// tile mostly empty, and the direct kernel reads each of its pixels from L1 instead.
inline Conv2dAlgorithm conv2d_algorithm(const Conv2dShape& s) {
  const bool few = s.groups > 1 && s.group_in() <= 8 && s.group_out() <= 8;
  if (few) return Conv2dAlgorithm::Direct;
  return s.pointwise() ? Conv2dAlgorithm::Pointwise : Conv2dAlgorithm::Implicit;
}

// Strides in elements. channels_last: `channel` is 1; otherwise `column` is 1.
struct ImageStrides {
  int64_t image, channel, row, column;
};

struct Conv2dParams {
  DType dtype;
  Conv2dShape shape;
  Conv2dAlgorithm algorithm;
  Activation activation;
  const void* input;  // [N, C, H, W], strides below
  ImageStrides input_strides;
  const void* weight;           // [K, C / groups, R, S], strides below, any; not read when `packed` is given
  ImageStrides weight_strides;  // of k, c, r, s
  const void* packed;           // null, or what conv2d_pack wrote for this shape, layout and ISA (compute type)
  const void* bias;             // [K], stride 1, or null
  void* output;                 // [N, K, OH, OW], dense in the memory format of `channels_last`
  void* pre_activation;         // null, or as output: the value before the activation, saved for the backward
  int threads;
};

struct Conv2dBackwardParams {
  DType dtype;
  Conv2dShape shape;
  Conv2dAlgorithm algorithm;
  const void* grad_output;  // [N, K, OH, OW], dense in the memory format; the activation's derivative is already in it
  const void* input;        // [N, C, H, W], strides below; read for grad_weight only
  ImageStrides input_strides;
  const void* weight;  // [K, C / groups, R, S], strides below; read for grad_input only
  ImageStrides weight_strides;
  void* grad_input;   // [N, C, H, W], dense in the memory format, or null
  void* grad_weight;  // [K, C / groups, R, S], strides below, dense in some order, or null
  ImageStrides grad_weight_strides;
  void* grad_bias;  // [K], or null
  int threads;
};

// grad_pre = grad_output * f'(saved), all of one dense layout; saved is the output where f' can be had from it
// (activation_from_output), else the value before the activation.
struct Conv2dActivationBackwardParams {
  DType dtype;
  Activation activation;
  const void* grad_output;  // [count]
  const void* saved;        // [count]
  void* grad_pre;           // [count]
  int64_t count;
  int threads;
};

namespace cpu {

void conv2d_forward(const Conv2dParams& params);
void conv2d_backward(const Conv2dBackwardParams& params);
void conv2d_activation_backward(const Conv2dActivationBackwardParams& params);
// Elements (of the compute type) that the packed weights of this shape take on the ISA in use, and the packing itself:
// only shape, algorithm, weight, weight_strides, dtype and threads of `params` are read.
int64_t conv2d_packed_size(const Conv2dParams& params);
void conv2d_pack(const Conv2dParams& params, void* packed);

}  // namespace cpu
}  // namespace fastnn

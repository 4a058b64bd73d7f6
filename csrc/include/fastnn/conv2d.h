// 2-D convolution: the contract between the bindings and the kernels.
//
//   output[n, k, oy, ox] = f(bias[k] + sum over c, r, s of
//       input[n, k / (K / groups) * (C / groups) + c, oy * stride_h + r * dilation_h - pad_top, ox * stride_w + s * dilation_w - pad_left]
//       * weight[k, c, r, s]),   input read as zero outside the image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastnn/types.h"

namespace fastnn {

// Pointwise: 1x1 without stride or padding, the image is one row of pixels. Implicit: GEMM whose patches are gathered
// while packing. Direct: few channels a group (depthwise and its kin), no GEMM. Linear: the window is the whole image, which
// makes it linear's problem.
enum class Conv2dAlgorithm : int32_t { Pointwise, Implicit, Direct, Winograd2, Winograd4, Linear };
inline constexpr const char* kConv2dAlgorithmNames[] = {"pointwise", "implicit",  "direct",
                                                        "winograd2", "winograd4", "linear"};
inline bool is_winograd(Conv2dAlgorithm a) {
  return a == Conv2dAlgorithm::Winograd2 || a == Conv2dAlgorithm::Winograd4;
}

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
  bool whole() const {
    return R == H && S == W && pad_top == 0 && pad_left == 0 && OH == 1 && OW == 1 && groups == 1 && C > 0 &&
           (dilation_h == 1 || R == 1) && (dilation_w == 1 || S == 1);
  }
  bool winograd() const {
    return R == 3 && S == 3 && stride_h == 1 && stride_w == 1 && dilation_h <= 16 && dilation_w <= 16;
  }
  // The problem whose output is the gradient of this one's input; for stride 1.
  Conv2dShape transposed() const {
    Conv2dShape t = *this;
    t.C = K, t.H = OH, t.W = OW, t.K = C, t.OH = H, t.OW = W;
    t.pad_top = (R - 1) * dilation_h - pad_top, t.pad_left = (S - 1) * dilation_w - pad_left;
    return t;
  }
};

// What F(m x m, 3 x 3) costs in place of the direct sum, in multiply-adds that a core does in the same time (measured on
// AVX2): the products, with tiles that reach over the edge; the transforms, for each tile and channel; and what each
// element of the filter costs once a call, to be read from memory or, where it is not packed before, to be made:
// `filter`, and `written` more where all of it is more than a cache holds.
struct WinogradCost {
  int64_t m;
  double input, output, filter, written;
};
inline constexpr WinogradCost kWinogradCosts[] = {{2, 120, 110, 12, 18}, {4, 320, 270, 14, 5}};
inline constexpr double kWeightCost = 8, kCacheBytes = 4 << 20;

// Patches are gathered for all outputs at once, which costs as much as some more of them: in NCHW, where they are packed,
// twice as many.
inline double direct_cost(const Conv2dShape& s) {
  const int64_t gather = s.channels_last ? 3 : 6;
  return 9.0 * s.group_in() * (s.group_out() + gather) * (static_cast<double>(s.N) * s.OH * s.OW + kWeightCost);
}
inline double winograd_cost(const Conv2dShape& s, const WinogradCost& f, bool frozen) {
  const int64_t rows = f.m * s.dilation_h, columns = f.m * s.dilation_w;  // that tiles share
  const double tiles = static_cast<double>(s.N) * ((s.OH + rows - 1) / rows * s.dilation_h) *
                       ((s.OW + columns - 1) / columns * s.dilation_w);
  const double in = s.group_in(), out = s.group_out(), points = (f.m + 2) * (f.m + 2);
  const double made = f.filter + (4 * points * in * out > kCacheBytes ? f.written : 0);
  return points * in * out * (tiles + (frozen ? kWeightCost : made)) + tiles * (in * f.input + out * f.output);
}

// The rule that chooses, in one place; the number of threads has no say in it. A group with few channels leaves a GEMM
// tile mostly empty, and the direct kernel reads each of its pixels from L1 instead (in NHWC, where vectors run along the
// output channels, five of them fill a vector well enough). winograd: whether it may be chosen;
// frozen: whether the filter is packed before the call.
inline Conv2dAlgorithm conv2d_algorithm(const Conv2dShape& s, bool winograd, bool frozen) {
  const bool few = s.groups > 1 && s.group_in() <= 8 && s.group_out() <= (s.channels_last ? 4 : 8);
  if (few) return Conv2dAlgorithm::Direct;
  // Fewer channels run in bands of padded rows, which in NCHW are as fast.
  const int64_t fewest = s.channels_last ? 8 : 16;
  if (winograd && s.winograd() && s.group_in() >= fewest && s.group_out() >= fewest) {
    const double two = winograd_cost(s, kWinogradCosts[0], frozen), four = winograd_cost(s, kWinogradCosts[1], frozen);
    if (std::min(two, four) < 0.8 * direct_cost(s))
      return four < two ? Conv2dAlgorithm::Winograd4 : Conv2dAlgorithm::Winograd2;
  }
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
  Conv2dAlgorithm algorithm, input_algorithm;  // of all, but for grad_input
  Activation activation;
  const void* grad_output;  // [N, K, OH, OW], dense in the memory format
  const void* saved;  // as grad_output, read with an activation: the output where the derivative can be had from it
                      // (activation_from_output), else the value before the activation
  const void* input;  // [N, C, H, W], strides below; read for grad_weight only
  ImageStrides input_strides;
  const void* weight;  // [K, C / groups, R, S], strides below; read for grad_input only
  ImageStrides weight_strides;
  void* grad_input;   // [N, C, H, W], dense in the memory format, or null
  void* grad_weight;  // [K, C / groups, R, S], strides below, dense in some order, or null
  ImageStrides grad_weight_strides;
  void* grad_bias;  // [K], or null
  int threads;
};

namespace cpu {

void conv2d_forward(const Conv2dParams& params);
void conv2d_backward(const Conv2dBackwardParams& params);
// Elements (of the compute type) that the packed weights of this shape take on the ISA in use, and the packing itself:
// only shape, algorithm, weight, weight_strides, dtype and threads of `params` are read.
int64_t conv2d_packed_size(const Conv2dParams& params);
void conv2d_pack(const Conv2dParams& params, void* packed);
// Output channels that lie next to each other in Winograd's packed weights.
int64_t conv2d_panel_width(const Conv2dParams& params);

}  // namespace cpu
}  // namespace fastnn

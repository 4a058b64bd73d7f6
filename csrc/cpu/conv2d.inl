// Entry of the convolution: from the params to passes over an output grid, and to the kernel that runs them.
#pragma once

#include "cpu/conv2d_backward.inl"
#include "cpu/conv2d_kernels.h"
#include "cpu/conv2d_pass.inl"

namespace fastnn::cpu::FASTNN_ISA {

inline void conv2d_forward_all(const Conv2dParams& params) {
  conv2d_with_type(params.dtype, [&](auto type) {
    Scratch<Tap> taps(params.shape.R * params.shape.S);
    run_pass(forward_pass<decltype(type)>(params, taps), params.algorithm, params.shape.channels_last);
  });
}

inline int64_t conv2d_packed_size_all(const Conv2dParams& params) {
  int64_t size = 0;
  conv2d_with_type(params.dtype, [&](auto type) {
    Scratch<Tap> taps(params.shape.R * params.shape.S);
    const auto p = forward_pass<decltype(type)>(params, taps);
    if (params.algorithm == Conv2dAlgorithm::Winograd2)
      size = packed_size_winograd<2>(p);
    else if (params.algorithm == Conv2dAlgorithm::Winograd4)
      size = packed_size_winograd<4>(p);
    else if (!params.shape.channels_last)
      size = p.groups * p.out * p.depth();
    else
      size = params.algorithm == Conv2dAlgorithm::Direct ? packed_size_direct_nhwc(p) : packed_size_nhwc(p);
  });
  return size;
}

inline void conv2d_pack_all(const Conv2dParams& params, void* packed) {
  conv2d_with_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Tap> taps(params.shape.R * params.shape.S);
    const auto p = forward_pass<T>(params, taps);
    auto* to = static_cast<Compute<T>*>(packed);
    if (params.algorithm == Conv2dAlgorithm::Winograd2)
      pack_winograd<2>(p, to);
    else if (params.algorithm == Conv2dAlgorithm::Winograd4)
      pack_winograd<4>(p, to);
    else if (!params.shape.channels_last)
      order_weights(p, to);
    else if (params.algorithm == Conv2dAlgorithm::Direct)
      pack_direct_nhwc(p, to);
    else
      pack_nhwc(p, to);
  });
}

inline int64_t conv2d_panel_width_all(const Conv2dParams& params) {
  return params.dtype == DType::Float64 ? kNR<double> : kNR<float>;
}

inline void conv2d_backward_all(const Conv2dBackwardParams& params) {
  conv2d_with_type(params.dtype, [&](auto type) { conv2d_backward_typed<decltype(type)>(params); });
}

inline constexpr Conv2dKernels conv2d_kernels = {conv2d_forward_all, conv2d_backward_all, conv2d_packed_size_all,
                                                 conv2d_pack_all, conv2d_panel_width_all};

}  // namespace fastnn::cpu::FASTNN_ISA

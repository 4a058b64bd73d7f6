// From the params of a convolution to the pass that the kernels run.
#pragma once

#include "cpu/conv2d_band_nchw.inl"
#include "cpu/conv2d_direct.inl"
#include "cpu/conv2d_implicit_nchw.inl"
#include "cpu/conv2d_implicit_nhwc.inl"
#include "cpu/conv2d_pointwise_few.inl"

#include "cpu/conv2d_winograd.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class F>
void conv2d_with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32: return f(float{});
    case DType::Float64: return f(double{});
    case DType::BFloat16: return f(BFloat16{});
    case DType::Float16: return f(Float16{});
  }
}

inline ImageStrides dense_strides(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  if (channels_last) return {height * width * channels, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

// One past the last element that the strides reach.
inline int64_t extent(const ImageStrides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (n * c * h * w == 0) return 0;
  return (n - 1) * s.image + (c - 1) * s.channel + (h - 1) * s.row + (w - 1) * s.column + 1;
}

// Zeros where the strides reach, which lie in rows of W, or of W pixels.
template <class T>
void clear(T* to, const ImageStrides& st, int64_t N, int64_t C, int64_t H, int64_t W) {
  const int64_t planes = st.channel == 1 ? 1 : C, run = st.channel == 1 ? W * C : W;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < planes; ++c)
      for (int64_t y = 0; y < H; ++y)
        std::memset(static_cast<void*>(to + n * st.image + c * st.channel + y * st.row), 0, run * sizeof(T));
}

// 1x1 without stride or padding: an image whose rows follow one another becomes one row of pixels.
template <class T>
void flatten(Conv2dPass<T>& p) {
  if (p.source_strides.row != p.W * p.source_strides.column) return;
  p.W *= p.H, p.H = 1;
  p.OW *= p.OH, p.OH = 1;
  p.source_strides.row = 0;
  p.target_strides.row = p.OW * p.target_strides.column;
}

// The pass of the forward. `taps` has room for R * S.
template <class T>
Conv2dPass<T> forward_pass(const Conv2dParams& params, Tap* taps) {
  const Conv2dShape& s = params.shape;
  Conv2dPass<T> p{};
  p.source = static_cast<const T*>(params.input);
  p.source_strides = params.input_strides;
  p.source_end = p.source + extent(params.input_strides, s.N, s.C, s.H, s.W);
  p.H = s.H, p.W = s.W;
  p.target = static_cast<T*>(params.output);
  p.pre_activation = static_cast<T*>(params.pre_activation);
  p.target_strides = dense_strides(s.K, s.OH, s.OW, s.channels_last);
  p.OH = s.OH, p.OW = s.OW;
  p.step_h = s.stride_h, p.step_w = s.stride_w;
  p.N = s.N, p.groups = s.groups, p.in = s.group_in(), p.out = s.group_out();
  p.taps = taps, p.tap_count = s.R * s.S;
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t c = 0; c < s.S; ++c)
      *taps++ = {r * s.dilation_h - s.pad_top, c * s.dilation_w - s.pad_left,
                 r * params.weight_strides.row + c * params.weight_strides.column};
  p.weight = static_cast<const T*>(params.weight);
  p.weight_out = params.weight_strides.image, p.weight_in = params.weight_strides.channel;
  p.weight_group = p.out * p.weight_out;
  p.packed = static_cast<const Compute<T>*>(params.packed);
  p.bias = static_cast<const T*>(params.bias);
  p.activation = params.activation;
  p.threads = params.threads;
  if (params.algorithm == Conv2dAlgorithm::Pointwise) flatten(p);
  return p;
}

template <class T>
void run_pass(const Conv2dPass<T>& pass, Conv2dAlgorithm algorithm, bool channels_last) {
  if (pass.N * pass.groups * pass.out * pass.OH * pass.OW == 0) return;
  const bool direct = algorithm == Conv2dAlgorithm::Direct && pass.in > 0;
  if (direct && channels_last) return conv2d_direct_nhwc(pass);
  if (algorithm == Conv2dAlgorithm::Winograd2) return conv2d_winograd<2>(pass, channels_last);
  if (algorithm == Conv2dAlgorithm::Winograd4) return conv2d_winograd<4>(pass, channels_last);
  if (channels_last) return conv2d_implicit_nhwc(pass);
  if (PointwiseFew<T>::serves(pass)) return conv2d_pointwise_few(pass);
  if (BandNchw<T>::serves(pass)) return conv2d_band_nchw(pass);
  direct || DirectNchw<T>::serves(pass) ? conv2d_direct_nchw(pass) : conv2d_implicit_nchw(pass);
}

}  // namespace fastnn::cpu::FASTNN_ISA

// Gradients of the convolution.
//
// input: a convolution of grad_output, gathered. Input pixel y is reached from output (y + pad - r * dilation) / stride
// where that divides, so each phase of the input's grid (y mod stride_h, x mod stride_w) is one pass of stride 1 with the
// taps that divide; in and out change places. Few channels a group in NCHW: two phases at once, conv2d_grad_pairs.inl.
// Windows that do not overlap: conv2d_grad_patches.inl.
// weight: conv2d_grad_weight.inl. bias: sums over pixels, blocks of fixed size in a fixed order.
// activation: its derivative times grad_output, once, before both.
#pragma once

#include "cpu/conv2d_grad_pairs.inl"
#include "cpu/conv2d_grad_patches.inl"
#include "cpu/conv2d_grad_weight.inl"
#include "cpu/conv2d_pass.inl"

namespace fastnn::cpu::FASTNN_ISA {

inline int64_t modulo(int64_t a, int64_t b) { return ((a % b) + b) % b; }

template <class T>
void conv2d_grad_input(const Conv2dBackwardParams& params) {
  const Conv2dShape& s = params.shape;
  T* grad_input = static_cast<T*>(params.grad_input);
  const int64_t size = s.N * s.C * s.H * s.W;
  if (size == 0) return;
  const ImageStrides from = dense_strides(s.K, s.OH, s.OW, s.channels_last);
  const ImageStrides to = dense_strides(s.C, s.H, s.W, s.channels_last);
  if (params.input_algorithm == Conv2dAlgorithm::Implicit && s.N * s.K * s.OH * s.OW > 0 &&
      conv2d_grad_patches_serves(s, params.weight_strides))
    return conv2d_grad_patches<T>(params, from, to);
  // taps[phase of rows] and of columns: how many r (s) reach it.
  auto reaches = [](int64_t phase, int64_t pad, int64_t r, int64_t dilation, int64_t stride) {
    return modulo(phase + pad - r * dilation, stride) == 0;
  };
  bool gaps = s.N * s.K * s.OH * s.OW == 0;
  for (int64_t phase = 0; phase < s.stride_h; ++phase) {
    bool reached = false;
    for (int64_t r = 0; r < s.R; ++r) reached |= reaches(phase, s.pad_top, r, s.dilation_h, s.stride_h);
    gaps |= !reached;
  }
  for (int64_t phase = 0; phase < s.stride_w; ++phase) {
    bool reached = false;
    for (int64_t c = 0; c < s.S; ++c) reached |= reaches(phase, s.pad_left, c, s.dilation_w, s.stride_w);
    gaps |= !reached;
  }
  if (gaps) std::memset(static_cast<void*>(grad_input), 0, size * sizeof(T));
  if (s.N * s.K * s.OH * s.OW == 0) return;

  Scratch<Tap> taps(s.R * s.S);
  // Appends the taps that reach a phase, backwards, so that their pixels ascend.
  auto list = [&](int64_t py, int64_t px, int64_t count) {
    for (int64_t r = s.R - 1; r >= 0; --r)
      for (int64_t c = s.S - 1; c >= 0; --c)
        if (reaches(py, s.pad_top, r, s.dilation_h, s.stride_h) && reaches(px, s.pad_left, c, s.dilation_w, s.stride_w))
          taps[count++] = {(py + s.pad_top - r * s.dilation_h) / s.stride_h,
                           (px + s.pad_left - c * s.dilation_w) / s.stride_w,
                           r * params.weight_strides.row + c * params.weight_strides.column};
    return count;
  };
  auto pass = [&](int64_t py, int64_t px, int64_t count) {
    Conv2dPass<T> p{};
    p.source = static_cast<const T*>(params.grad_output);
    p.source_strides = from;
    p.source_end = p.source + extent(from, s.N, s.K, s.OH, s.OW);
    p.H = s.OH, p.W = s.OW;
    p.target = grad_input + py * to.row + px * to.column;
    p.target_strides = {to.image, to.channel, to.row * s.stride_h, to.column * s.stride_w};
    p.OH = (s.H - py + s.stride_h - 1) / s.stride_h;
    p.OW = (s.W - px + s.stride_w - 1) / s.stride_w;
    p.step_h = p.step_w = 1;
    p.N = s.N, p.groups = s.groups, p.in = s.group_out(), p.out = s.group_in();
    p.taps = taps, p.tap_count = count;
    p.weight = static_cast<const T*>(params.weight);
    p.weight_in = params.weight_strides.image, p.weight_out = params.weight_strides.channel;
    p.weight_group = p.in * p.weight_in;
    p.threads = params.threads;
    return p;
  };
  const bool pairs = params.input_algorithm == Conv2dAlgorithm::Direct && !s.channels_last && s.stride_w == 2;
  for (int64_t py = 0; py < std::min(s.stride_h, s.H); ++py) {
    if (pairs) {
      const int64_t even = list(py, 0, 0), all = list(py, 1, even);
      if (all > 0) conv2d_grad_pairs(pass(py, 0, all), even, s.W);
      continue;
    }
    for (int64_t px = 0; px < std::min(s.stride_w, s.W); ++px) {
      const int64_t count = list(py, px, 0);
      if (count == 0) continue;
      Conv2dPass<T> p = pass(py, px, count);
      if (params.input_algorithm == Conv2dAlgorithm::Pointwise) flatten(p);
      run_pass(p, params.input_algorithm, s.channels_last);
    }
  }
}

template <class T>
void conv2d_grad_bias(const Conv2dBackwardParams& params) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  const Conv2dShape& s = params.shape;
  const T* grad = static_cast<const T*>(params.grad_output);
  T* grad_bias = static_cast<T*>(params.grad_bias);
  const int64_t area = s.OH * s.OW;
  const int threads = worth_threads(params.threads, 0, double(s.N * s.K * area * sizeof(T)));
  if (!s.channels_last) {
    for_each_task(s.K, threads, [&](int64_t k) {
      C total = 0;
      for (int64_t n = 0; n < s.N; ++n) {
        const T* row = grad + (n * s.K + k) * area;
        Vec<C> acc[4] = {zero<C>(), zero<C>(), zero<C>(), zero<C>()};
        int64_t i = 0;
        for (; i + 4 * L <= area; i += 4 * L)
          for (int j = 0; j < 4; ++j) acc[j] += load(row + i + j * L);
        for (; i < area; i += L) acc[0] += load_first(row + i, area - i);
        total += reduce_add<C>((acc[0] + acc[1]) + (acc[2] + acc[3]));
      }
      store_one(grad_bias + k, total);
    });
    return;
  }
  // Some vectors of channels a task; pixels in blocks, so that no sum grows long.
  constexpr int64_t kChannels = 4 * L, kBlock = 256;
  for_each_task((s.K + kChannels - 1) / kChannels, threads, [&](int64_t task) {
    const int64_t k0 = task * kChannels, k1 = std::min(k0 + kChannels, s.K);
    Vec<C> total[4] = {zero<C>(), zero<C>(), zero<C>(), zero<C>()};
    for (int64_t q = 0; q < s.N * area; q += kBlock) {
      Vec<C> acc[4] = {zero<C>(), zero<C>(), zero<C>(), zero<C>()};
      for (int64_t i = q; i < std::min(q + kBlock, s.N * area); ++i)
        for (int64_t j = 0; k0 + j * L < k1; ++j) acc[j] += load_first(grad + i * s.K + k0 + j * L, k1 - k0 - j * L);
      for (int j = 0; j < 4; ++j) total[j] += acc[j];
    }
    for (int64_t j = 0; k0 + j * L < k1; ++j) store_first(grad_bias + k0 + j * L, total[j], k1 - k0 - j * L);
  });
}

template <class T>
void conv2d_backward_typed(const Conv2dBackwardParams& params) {
  if (params.grad_input) conv2d_grad_input<T>(params);
  if (params.grad_bias) conv2d_grad_bias<T>(params);
  if (!params.grad_weight) return;
  Conv2dParams forward{};
  forward.shape = params.shape;
  forward.algorithm = params.algorithm;
  forward.input = params.input, forward.input_strides = params.input_strides;
  forward.weight_strides = params.grad_weight_strides;  // a tap's offset is that of its gradient
  forward.threads = params.threads;
  Scratch<Tap> taps(params.shape.R * params.shape.S);
  const Conv2dGradWeight<T> g{forward_pass<T>(forward, taps), static_cast<const T*>(params.grad_output),
                              static_cast<T*>(params.grad_weight), params.grad_weight_strides};
  conv2d_grad_weight(g, params.algorithm, params.shape.channels_last);
}

inline void conv2d_activation_backward_all(const Conv2dActivationBackwardParams& params) {
  conv2d_with_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kGrain = 4096;
    const T *grad = static_cast<const T*>(params.grad_output), *saved = static_cast<const T*>(params.saved);
    T* to = static_cast<T*>(params.grad_pre);
    parallel(worth_threads(params.threads, 0, 3.0 * params.count * sizeof(T)), [&](int thread, int threads) {
      const Range r = share(params.count, kGrain, thread, threads);
      activate_backward_row(params.activation, grad + r.begin, saved + r.begin, to + r.begin, r.end - r.begin);
    });
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

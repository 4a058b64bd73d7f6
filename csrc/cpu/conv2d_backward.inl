// Gradients of the convolution.
//
// input: a convolution of grad_output, gathered. Input pixel y is reached from output (y + pad - r * dilation) / stride
// where that divides, so each phase of the input's grid (y mod stride_h, x mod stride_w) is one pass of stride 1 with the
// taps that divide; in and out change places. Few channels a group in NCHW: two phases at once, conv2d_grad_pairs.inl.
// Windows that do not overlap: conv2d_grad_patches.inl.
// weight: conv2d_grad_weight.inl. bias: sums over pixels, blocks of fixed size in a fixed order.
// activation: its derivative times grad_output, for a band of images or rows at a time, which all three then read from the
// cache: never the whole of it. 1x1 and depthwise on batches of 8 take 0.75 to 0.9 of the time of three passes over
// memory (Zen 3, one core), Winograd as long as before.
#pragma once

#include "cpu/conv2d_grad_pairs.inl"
#include "cpu/conv2d_grad_patches.inl"
#include "cpu/conv2d_grad_weight.inl"
#include "cpu/conv2d_pass.inl"

namespace fastnn::cpu::FASTNN_ISA {

inline constexpr int64_t kGradBand = 1 << 20;  // bytes

inline int64_t modulo(int64_t a, int64_t b) { return ((a % b) + b) % b; }

// Winograd's filter for the gradient of the input, transformed once for all bands.
template <class T>
class KeptFilter {
 public:
  KeptFilter(const Conv2dShape& s, Conv2dAlgorithm algorithm, bool keep)
      : two_(algorithm == Conv2dAlgorithm::Winograd2), filter_(keep && is_winograd(algorithm) ? size(s) : 0) {}
  // Null where it is not kept.
  const Compute<T>* of(const Conv2dPass<T>& p) {
    if (filter_.data() && !std::exchange(made_, true))
      two_ ? pack_winograd<2>(p, filter_) : pack_winograd<4>(p, filter_);
    return filter_;
  }

 private:
  int64_t size(const Conv2dShape& s) const {
    Conv2dPass<T> p{};
    p.groups = s.groups, p.in = s.group_out(), p.out = s.group_in();
    return two_ ? packed_size_winograd<2>(p) : packed_size_winograd<4>(p);
  }
  bool two_, made_ = false;
  Scratch<Compute<T>> filter_;
};

// from, to: strides of grad_output and of grad_input.
template <class T>
void conv2d_grad_input(const Conv2dBackwardParams& params, const ImageStrides& from, const ImageStrides& to,
                       KeptFilter<T>& kept) {
  const Conv2dShape& s = params.shape;
  T* grad_input = static_cast<T*>(params.grad_input);
  if (s.N * s.C * s.H * s.W == 0) return;
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
  if (gaps) clear(grad_input, to, s.N, s.C, s.H, s.W);
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
      p.packed = kept.of(p);
      run_pass(p, params.input_algorithm, s.channels_last);
    }
  }
}

// The sum of each channel's pixels: those of an image follow one another, in NHWC those of all.
template <class T>
void conv2d_grad_bias(const Conv2dBackwardParams& params, const T* grad, const ImageStrides& from,
                      Compute<T>* grad_bias) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  const int64_t images = params.shape.N, K = params.shape.K, area = params.shape.OH * params.shape.OW;
  const int threads = worth_threads(params.threads, 0, double(images * K * area * sizeof(T)));
  if (!params.shape.channels_last) {
    for_each_task(K, threads, [&](int64_t k) {
      C total = 0;
      for (int64_t n = 0; n < images; ++n) {
        const T* row = grad + n * from.image + k * from.channel;
        Vec<C> acc[4] = {zero<C>(), zero<C>(), zero<C>(), zero<C>()};
        int64_t i = 0;
        for (; i + 4 * L <= area; i += 4 * L)
          for (int j = 0; j < 4; ++j) acc[j] += load(row + i + j * L);
        for (; i < area; i += L) acc[0] += load_first(row + i, area - i);
        total += reduce_add<C>((acc[0] + acc[1]) + (acc[2] + acc[3]));
      }
      grad_bias[k] = total;
    });
    return;
  }
  // Some vectors of channels a task; pixels in blocks, so that no sum grows long.
  constexpr int64_t kChannels = 4 * L, kBlock = 256;
  for_each_task((K + kChannels - 1) / kChannels, threads, [&](int64_t task) {
    const int64_t k0 = task * kChannels, k1 = std::min(k0 + kChannels, K);
    Vec<C> total[4] = {zero<C>(), zero<C>(), zero<C>(), zero<C>()};
    for (int64_t q = 0; q < images * area; q += kBlock) {
      Vec<C> acc[4] = {zero<C>(), zero<C>(), zero<C>(), zero<C>()};
      for (int64_t i = q; i < std::min(q + kBlock, images * area); ++i)
        for (int64_t j = 0; k0 + j * L < k1; ++j) acc[j] += load_first(grad + i * K + k0 + j * L, k1 - k0 - j * L);
      for (int j = 0; j < 4; ++j) total[j] += acc[j];
    }
    for (int64_t j = 0; k0 + j * L < k1; ++j) store_first(grad_bias + k0 + j * L, total[j], k1 - k0 - j * L);
  });
}

// `grad` reads grad_output with the strides `from`; input and pad_top are those of params.
template <class T>
void conv2d_grad_weight(const Conv2dBackwardParams& params, const T* grad, const ImageStrides& from,
                        Compute<T>* grad_weight) {
  Conv2dParams forward{};
  forward.shape = params.shape;
  forward.algorithm = params.algorithm;
  forward.input = params.input, forward.input_strides = params.input_strides;
  forward.weight_strides = params.grad_weight_strides;  // a tap's offset is that of its gradient
  forward.threads = params.threads;
  Scratch<Tap> taps(params.shape.R * params.shape.S);
  Conv2dPass<T> pass = forward_pass<T>(forward, taps);
  pass.target_strides.image = from.image, pass.target_strides.channel = from.channel;
  conv2d_grad_weight(Conv2dGradWeight<T>{pass, grad, grad_weight, params.grad_weight_strides}, params.algorithm,
                     params.shape.channels_last);
}

// A gradient in the type of the sums, which bands add to in their order.
template <class T>
class BandSum {
  using C = Compute<T>;
  static constexpr bool kInPlace = std::is_same_v<T, C>;

 public:
  // part: the most elements that a band adds to; 0 where no two bands add to the same.
  BandSum(void* result, int64_t count, int64_t part)
      : result_(static_cast<T*>(result)),
        count_(result ? count : 0),
        sum_(kInPlace ? 0 : count_),
        part_(result ? part : 0) {}

  // write(to) makes a band's share of `count` elements from `begin` on; first: nothing was added to them before.
  template <class F>
  void add(int64_t begin, int64_t count, bool first, const F& write) {
    if (!result_) return;
    C* sum = sum_;
    if constexpr (kInPlace) sum = result_;
    if (first) return write(sum + begin);
    write(part_.data());
    for (int64_t i = 0; i < count; ++i) sum[begin + i] += part_[i];
  }
  void finish() const {
    if constexpr (!kInPlace)
      if (result_) copy_run(result_, sum_.data(), count_);
  }

 private:
  T* result_;
  int64_t count_;
  Scratch<C> sum_, part_;
};

// The bands: some whole images, or some groups of one in NCHW, or some rows. As large as stays in the cache, and not so
// many that to add up the gradients of the weights counts; a function of the shape alone, as the order of the sums is.
struct GradBands {
  int64_t images, groups, rows;
  int64_t halo;  // more rows that the gradient of the input needs
};
template <class T>
GradBands conv2d_grad_bands(const Conv2dBackwardParams& params) {
  const Conv2dShape& s = params.shape;
  const int64_t weights = s.K * s.group_in() * s.R * s.S * int64_t(sizeof(Compute<T>));
  const int64_t most = std::max<int64_t>(kGradBand, weights / 2), row = s.K * s.OW * int64_t(sizeof(T));
  const int64_t image = s.OH * row, group = image / s.groups;
  auto evenly = [](int64_t count, int64_t size) {
    const int64_t parts = (count + size - 1) / size;
    return (count + parts - 1) / parts;
  };
  if (params.activation == Activation::None || 2 * s.N * image <= 3 * most) return {s.N, s.groups, s.OH, 0};
  if (image <= most) return {evenly(s.N, most / image), s.groups, s.OH, 0};
  if (!s.channels_last && s.groups > 1 && group <= most) return {1, evenly(s.groups, most / group), s.OH, 0};
  // Fours are whole tiles of Winograd. A window much taller than a band would have its halo made many times.
  const int64_t before = std::max<int64_t>((s.R - 1) * s.dilation_h - s.pad_top, 0) / s.stride_h;
  const int64_t after = (std::max<int64_t>(s.pad_top, 0) + s.stride_h - 1) / s.stride_h;
  const int64_t halo = params.grad_input ? before + after : 0;
  const int64_t rows = (evenly(s.OH, std::max({most / row, halo, int64_t(1)})) + 3) / 4 * 4;
  return {1, s.groups, std::min(rows, s.OH), rows < s.OH ? halo : 0};
}

// Part of grad_output: images n0 … n1, groups g0 … g1, rows y0 … y1; all, but along one of the three.
struct GradBand {
  int64_t n0, n1, g0, g1, y0, y1;
};

// to = grad_output * f'(saved) in a band, dense.
template <class T>
void conv2d_grad_activation(const Conv2dBackwardParams& params, const GradBand& b, T* to) {
  const Conv2dShape& s = params.shape;
  const ImageStrides st = dense_strides(s.K, s.OH, s.OW, s.channels_last);
  const int64_t first = b.n0 * st.image + b.g0 * s.group_out() * st.channel + b.y0 * st.row;
  const int64_t count = (b.n1 - b.n0) * (b.g1 - b.g0) * s.group_out() * (b.y1 - b.y0) * s.OW;
  int64_t length = count, step = 0;  // of a run, and from one to the next
  if (b.g1 - b.g0 < s.groups) {
    length = (b.g1 - b.g0) * s.group_out() * s.OH * s.OW, step = st.image;
  } else if (b.y1 - b.y0 < s.OH && !s.channels_last) {
    length = (b.y1 - b.y0) * s.OW, step = st.channel;
  }
  const T* const grad = static_cast<const T*>(params.grad_output) + first;
  const T* const saved = static_cast<const T*>(params.saved) + first;
  parallel(worth_threads(params.threads, 0, 3.0 * count * sizeof(T)), [&](int thread, int threads) {
    const Range r = share(count, 4096, thread, threads);
    for (int64_t at = r.begin; at < r.end;) {
      const int64_t run = at / length, n = std::min(r.end, (run + 1) * length) - at, from = at + run * (step - length);
      activate_backward_row(params.activation, grad + from, saved + from, to + at, n);
      at += n;
    }
  });
}

template <class T>
void conv2d_backward_typed(const Conv2dBackwardParams& params) {
  const Conv2dShape& s = params.shape;
  const GradBands bands = conv2d_grad_bands<T>(params);
  const bool plain = params.activation == Activation::None, add = bands.images < s.N || bands.rows < s.OH;
  const int64_t depth = s.group_in() * s.R * s.S, outputs = add ? bands.groups * s.group_out() : 0;
  BandSum<T> weight(params.grad_weight, s.K * depth, outputs * depth), bias(params.grad_bias, s.K, outputs);
  Scratch<T> memory(plain ? 0 : bands.images * bands.groups * s.group_out() * (bands.rows + bands.halo) * s.OW);
  KeptFilter<T> kept(s, params.input_algorithm, add && bands.groups == s.groups);
  const ImageStrides to = dense_strides(s.C, s.H, s.W, s.channels_last);
  auto band = [&](const GradBand& b) {
    Conv2dBackwardParams part = params;
    Conv2dShape& q = part.shape;
    q.N = b.n1 - b.n0, q.groups = b.g1 - b.g0, q.K = q.groups * s.group_out(), q.C = q.groups * s.group_in();
    // Rows i0 … i1 of grad_input are reached from lo … hi of grad_output; j0 … j1 of the input reach y0 … y1.
    const int64_t reach = (s.R - 1) * s.dilation_h;
    const int64_t i0 = std::min(b.y0 * s.stride_h, s.H), i1 = b.y1 == s.OH ? s.H : std::min(b.y1 * s.stride_h, s.H);
    const int64_t j0 = std::clamp<int64_t>(b.y0 * s.stride_h - s.pad_top, 0, s.H - 1);
    const int64_t j1 = std::clamp<int64_t>((b.y1 - 1) * s.stride_h - s.pad_top + reach + 1, j0 + 1, s.H);
    GradBand wide = b;
    if (b.y1 - b.y0 < s.OH && params.grad_input && i0 < i1) {
      wide.y0 = std::clamp<int64_t>((i0 + s.pad_top - reach + s.stride_h - 1) / s.stride_h, 0, b.y0);
      wide.y1 = std::clamp<int64_t>((i1 - 1 + s.pad_top) / s.stride_h + 1, b.y1, s.OH);
    }
    const ImageStrides from = dense_strides(q.K, wide.y1 - wide.y0, s.OW, s.channels_last);
    const T* grad = static_cast<const T*>(params.grad_output);
    if (!plain) {
      conv2d_grad_activation(params, wide, memory.data());
      grad = memory;
    }
    const int64_t k0 = b.g0 * s.group_out(), c0 = b.g0 * s.group_in();
    if (params.grad_input && i0 < i1) {
      q.H = i1 - i0, q.OH = wide.y1 - wide.y0, q.pad_top = s.pad_top + i0 - wide.y0 * s.stride_h;
      part.grad_output = grad;
      part.weight = static_cast<const T*>(params.weight) + k0 * params.weight_strides.image;
      part.grad_input = static_cast<T*>(params.grad_input) + b.n0 * to.image + c0 * to.channel + i0 * to.row;
      conv2d_grad_input<T>(part, from, to, kept);
    }
    grad += (b.y0 - wide.y0) * from.row;
    q.H = j1 - j0, q.OH = b.y1 - b.y0, q.pad_top = s.pad_top + j0 - b.y0 * s.stride_h;
    const bool first = b.n0 == 0 && b.y0 == 0;
    bias.add(k0, q.K, first, [&](auto* sums) { conv2d_grad_bias(part, grad, from, sums); });
    part.input = static_cast<const T*>(params.input) + b.n0 * params.input_strides.image +
                 c0 * params.input_strides.channel + j0 * params.input_strides.row;
    weight.add(k0 * depth, q.K * depth, first, [&](auto* sums) { conv2d_grad_weight(part, grad, from, sums); });
  };
  for (int64_t n = 0; n < s.N; n += bands.images)
    for (int64_t g = 0; g < s.groups; g += bands.groups)
      for (int64_t y = 0; y < s.OH; y += bands.rows)
        band({n, std::min(n + bands.images, s.N), g, std::min(g + bands.groups, s.groups), y,
              std::min(y + bands.rows, s.OH)});
  weight.finish();
  bias.finish();
}

}  // namespace fastnn::cpu::FASTNN_ISA

// 1x1 convolution in NCHW to a few output channels, as in the last layer of a mask: no panel, no tile.
//
// Sums of some pixels for all output channels stay in L1 while the input channels pass, four at a time: each is read once
// and in one long stream, where a panel of 16 pixels would be a stride of a whole plane for each channel, and packing it
// would cost more than its two or three products. Bound by memory.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct PointwiseFew {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, kAtOnce = 4;
  static constexpr int64_t kMostOut = 4, kPixels = 4096 / sizeof(C);  // of one chunk: 16 KiB of sums at most
  const Conv2dPass<T>& p;
  const C* rows;  // weights, [groups * out][in]
  int64_t chunks;

  PointwiseFew(const Conv2dPass<T>& pass, const C* weight_rows)
      : p(pass), rows(weight_rows), chunks((pass.OW + kPixels - 1) / kPixels) {}

  // One row of pixels, as flatten makes it.
  static bool serves(const Conv2dPass<T>& p) {
    return p.tap_count == 1 && p.out <= kMostOut && p.OH == 1 && p.H == 1 && p.W == p.OW && p.step_w == 1 &&
           p.taps[0].dx == 0 && p.taps[0].dy == 0 && p.source_strides.column == 1 && p.target_strides.column == 1;
  }
  int64_t tasks() const { return p.N * p.groups * chunks; }

  void run(int64_t task) const {
    const int64_t x = task % chunks * kPixels, count = std::min(kPixels, p.OW - x);
    const int64_t group = task / chunks % p.groups, image = task / (chunks * p.groups);
    alignas(64) C sums[kMostOut * kPixels];
    for (int64_t i = 0; i < p.out; ++i) {
      const Vec<C> start = p.bias ? splat<C>(load_one(p.bias + group * p.out + i)) : zero<C>();
      for (int64_t q = 0; q < count; q += L) store(sums + i * kPixels + q, start);
    }
    const T* from = p.source + image * p.source_strides.image + group * p.in * p.source_strides.channel + x;
    with_exact_rows(p.out, [&](auto height) {
      constexpr int ROWS = decltype(height)::value <= kMostOut ? decltype(height)::value : 1;
      int64_t c = 0;
      for (; c + kAtOnce <= p.in; c += kAtOnce) add<ROWS, kAtOnce>(from, group, c, count, sums);
      for (; c < p.in; ++c) add<ROWS, 1>(from, group, c, count, sums);
    });
    for (int64_t i = 0; i < p.out; ++i) {
      C* const row = sums + i * kPixels;
      const int64_t at = image * p.target_strides.image + (group * p.out + i) * p.target_strides.channel + x;
      if (p.pre_activation) copy_run(p.pre_activation + at, row, count);
      if (p.activation != Activation::None) activate_in_place<C>(p.activation, row, (count + L - 1) / L * L);
      copy_run(p.target + at, row, count);
    }
  }

  template <int ROWS, int CHANNELS>
  void add(const T* from, int64_t group, int64_t c, int64_t count, C* sums) const {
    const int64_t channel = p.source_strides.channel;
    Vec<C> weight[ROWS][CHANNELS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < CHANNELS; ++j) weight[i][j] = splat<C>(rows[(group * p.out + i) * p.in + c + j]);
    from += c * channel;
    auto step = [&](int64_t q, const auto& read) __attribute__((always_inline)) {
      Vec<C> acc[ROWS];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) acc[i] = load(sums + i * kPixels + q);
#pragma GCC unroll 4
      for (int j = 0; j < CHANNELS; ++j) {
        const Vec<C> pixels = read(from + j * channel + q);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) acc[i] = fma(weight[i][j], pixels, acc[i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) store(sums + i * kPixels + q, acc[i]);
    };
    int64_t q = 0;
    for (; q + L <= count; q += L) step(q, [](const T* at) __attribute__((always_inline)) { return load(at); });
    if (q < count) step(q, [&](const T* at) __attribute__((always_inline)) { return load_first(at, count - q); });
  }
};

template <class T>
void conv2d_pointwise_few(const Conv2dPass<T>& p) {
  const WeightRows<T> rows(p);
  const PointwiseFew<T> kernel(p, rows.data);
  for_each_task(kernel.tasks(), worth_threads(p.threads, p.flops(), double(p.N * p.groups * p.in * p.OW * sizeof(T))),
                [&](int64_t task) { kernel.run(task); });
}

}  // namespace fastnn::cpu::FASTNN_ISA

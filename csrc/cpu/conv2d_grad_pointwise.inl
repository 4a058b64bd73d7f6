// Gradient of the weight of a 1x1 convolution in NCHW: linear's GEMM, [out, pixels] x [pixels, in].
//
// Both operands have pixels next to each other, and its panels are transposed while they are packed: vectors then run along
// input channels, and a tile ends without the reduction that a dot product of few pixels would mostly be. The depth runs
// over the pixels of all images.
#pragma once

#include "cpu/conv2d_tile.inl"
#include "cpu/linear_store.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Channels of all images as the rows of A and the columns of B, pixels as the depth.
template <class T>
struct ImageChannels {
  using C = Compute<T>;
  static constexpr bool kPrepacked = false;
  const T* data;
  int64_t image, channel, area;  // strides, and pixels of an image

  int group() const { return 1; }
  const C* panel(int64_t m0, int64_t rows, int64_t k0, int64_t depth, C* scratch) const {
    const RowTiles<C> tiles(rows);
    for (int64_t t = 0; t < tiles.count; ++t)
      pack_images<kMR<C>>(m0 + tiles.begin(t), tiles.begin(t + 1) - tiles.begin(t), k0, depth,
                          scratch + t * kMR<C> * depth);
    return scratch;
  }
  void pack(int64_t n0, int64_t cols, int64_t k0, int64_t depth, C* to) const {
    constexpr int64_t NR = kNR<C>;
    for (int64_t n = 0; n < cols; n += NR) pack_images<NR>(n0 + n, std::min(NR, cols - n), k0, depth, to + n * depth);
  }

 private:
  template <int WIDTH>
  void pack_images(int64_t first, int64_t count, int64_t k0, int64_t depth, C* to) const {
    for (int64_t k = k0; k < k0 + depth;) {
      const int64_t n = std::min(area - k % area, k0 + depth - k);
      pack_panel<WIDTH>(data + k / area * image + first * channel + k % area, channel, 1, count, n, to);
      k += n, to += n * WIDTH;
    }
  }
};

// One row of pixels an image, as flatten makes it, weights as they are in a matrix, and enough of both kinds of channels
// to be worth their transposes: with 2 outputs dot products took 0.77 of the time.
template <class T>
bool conv2d_grad_pointwise_serves(const Conv2dGradWeight<T>& g) {
  const Conv2dPass<T>& p = g.p;
  return p.tap_count == 1 && p.groups == 1 && p.H == 1 && p.OH == 1 && p.W == p.OW && p.step_w == 1 &&
         p.out >= kMR<Compute<T>> && p.in >= kLanes<Compute<T>> && p.taps[0].dx == 0 && p.taps[0].dy == 0 &&
         p.source_strides.column == 1 && p.target_strides.column == 1 && g.strides.channel == 1 &&
         g.strides.image == p.in;
}
template <class T>
void conv2d_grad_pointwise(const Conv2dGradWeight<T>& g) {
  const Conv2dPass<T>& p = g.p;
  gemm<Compute<T>>(p.out, p.in, p.N * p.OW,
                   ImageChannels<T>{g.grad, p.target_strides.image, p.target_strides.channel, p.OW},
                   ImageChannels<T>{p.source, p.source_strides.image, p.source_strides.channel, p.OW},
                   RowMajorStore<T, Compute<T>>{g.grad_weight, p.in, nullptr, Activation::None, nullptr}, p.threads);
}

}  // namespace fastnn::cpu::FASTNN_ISA

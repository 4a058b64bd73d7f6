// Gradient of the weight in NCHW as linear's GEMM: for each group [out, pixels] x [pixels, in * taps].
//
// Both operands have pixels next to each other; their panels are transposed while they are packed, so that vectors run
// along (channel, tap) and a tile ends without the reduction that a dot product of few pixels would mostly be. The depth
// runs over the pixels of all images. Patches are gathered by the pieces of the forward, some channels at a time.
#pragma once

#include "cpu/conv2d_implicit_nchw.inl"
#include "cpu/linear_store.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Channels of all images as rows, pixels as the depth: A, and B where each channel is one row of patches.
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

// (channel, tap) of one group's patches as columns.
template <class T>
struct PatchColumns {
  using C = Compute<T>;
  static constexpr bool kPrepacked = false;
  static constexpr int64_t NR = kNR<C>, kDepth = 256;  // pixels: all taps of them wait in rows while they are packed
  const Conv2dPass<T>& p;
  const T* source;  // first channel of the group

  // Whole channels where that is few panels.
  int group() const {
    return static_cast<int>(std::min<int64_t>(p.tap_count * std::max<int64_t>(8 / p.tap_count, 1), 32));
  }
  void pack(int64_t n0, int64_t cols, int64_t k0, int64_t depth, C* to) const {
    const int64_t first = n0 / p.tap_count, last = (n0 + cols + p.tap_count - 1) / p.tap_count;
    const PatchRows<T> patches(p, (depth + NR - 1) / NR * NR);
    const Scratch<C> rows(patches.size(last - first));
    patches.gather(source + first * p.source_strides.channel, last - first, k0, depth, rows.data());
    const int64_t width = patches.width;
    const C* from = rows.data() + (n0 - first * p.tap_count) * width;
    for (int64_t j = 0; j < cols; j += NR)
      pack_panel<NR>(from + j * width, width, 1, std::min(NR, cols - j), depth, to + j * depth);
  }
};

// Whether the weights are as in a matrix [groups * out][in * taps], and enough of them to be worth the transposes: dot
// products took 0.77 of the time for 32 channels to 2, 0.86 for 27 (channel, tap) to 32.
template <class T>
bool conv2d_grad_gemm_serves(const Conv2dGradWeight<T>& g) {
  const Conv2dPass<T>& p = g.p;
  bool matrix = g.strides.channel == p.tap_count && g.strides.image == p.depth();
  for (int64_t t = 0; matrix && t < p.tap_count; ++t) matrix = p.taps[t].weight == t;
  return matrix && p.out >= kMR<Compute<T>> && p.out * p.depth() >= 1024;
}
template <class T>
void conv2d_grad_gemm(const Conv2dGradWeight<T>& g) {
  using C = Compute<T>;
  const Conv2dPass<T>& p = g.p;
  const int64_t pixels = p.N * p.OH * p.OW, depth = p.depth();
  const bool rows = p.tap_count == 1 && p.H == 1 && p.OH == 1 && p.W == p.OW && p.step_w == 1 && p.taps[0].dx == 0 &&
                    p.taps[0].dy == 0;  // as flatten makes them
  auto multiply = [&](int64_t group, const auto& run) {
    const T* source = p.source + group * p.in * p.source_strides.channel;
    const ImageStrides& st = p.target_strides;
    const ImageChannels<T> a{g.grad + group * p.out * st.channel, st.image, st.channel, p.OH * p.OW};
    const RowMajorStore<C, C> store{g.grad_weight + group * p.out * depth, depth, nullptr, Activation::None, nullptr};
    if (rows)
      run(a, ImageChannels<T>{source, p.source_strides.image, p.source_strides.channel, p.OW}, store);
    else
      run(a, PatchColumns<T>{p, source}, store);
  };
  if (p.groups == 1)
    return multiply(0, [&](const auto& a, const auto& b, const auto& store) {
      gemm<C>(p.out, depth, pixels, a, b, store, p.threads);
    });
  for_each_task(p.groups, worth_threads(p.threads, p.flops(), 0), [&](int64_t group) {
    multiply(group, [&](const auto& a, const auto& b, const auto& store) {
      gemm_region<C>(0, p.out, 0, depth, pixels, a, b, store, false);
    });
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

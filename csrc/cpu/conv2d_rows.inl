// Convolution in NCHW of few channels and wide rows (a stem), as an implicit GEMM whose B is never packed.
//
// The padded rows of conv2d_direct.inl, split by phase of the stride, hold every pixel once; under a tap the 16 pixels of
// a tile (AVX2) are two plain loads from there, at an offset that depends on (channel, tap) alone. So where the panels of
// conv2d_implicit_nchw.inl copy a pixel once for each tap, here it is copied once for each band of output rows, and the
// sums of a whole depth stay in registers.
//
// Tiles of 6 output channels x 2 vectors of pixels of one row. The rows and the tile's weights stay in L1: FMA-bound.
#pragma once

#include "cpu/conv2d_direct.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct RowsNchw : DirectNchw<T> {
  using Base = DirectNchw<T>;
  using C = Compute<T>;
  using Base::p, Base::rows, Base::offsets, Base::row, Base::band, Base::bands, Base::fill;
  static constexpr int L = kLanes<C>;

  RowsNchw(const Conv2dPass<T>& pass, const C* weight_rows) : Base(pass, weight_rows, 1) {}

  // Whether rows fill their tiles, and rows and weights the caches that they are meant for.
  static bool serves(const Conv2dPass<T>& p) {
    if (p.tap_count == 1 || p.out < 4 || p.depth() > 512) return false;
    const TapBox box(p);
    const int64_t wide = (p.OW + L - 1) / L * L;
    if (p.OW * 5 < wide * 4) return false;
    const int64_t row = (wide + (box.x1 - box.x0) / p.step_w) * p.step_w, reach = box.y1 - box.y0 + 1;
    return p.in * row * reach * int64_t(sizeof(C)) <= 20480;
  }

  void run(int64_t task, C* block) const {
    const int64_t image = task / (p.groups * bands), group = task / bands % p.groups;
    const int64_t y0 = task % bands * band, y1 = std::min(y0 + band, p.OH);
    if (y0 >= y1) return;
    fill(image, group, y0, y1, block);
    const EvenRows tiles(p.out);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t channel = group * p.out + tiles.begin(tile);
      with_exact_rows(tiles.begin(tile + 1) - tiles.begin(tile), [&](auto height) {
        constexpr int ROWS = decltype(height)::value;
        for (int64_t y = y0; y < y1; ++y) {
          const C* from = block + (y - y0) * p.step_h * row;
          int64_t x = 0;
          for (; x + L < p.OW; x += 2 * L) multiply<ROWS, 2>(from + x, image, channel, y, x);
          if (x < p.OW) multiply<ROWS, 1>(from + x, image, channel, y, x);
        }
      });
    }
  }

  template <int ROWS, int VECTORS>
  void multiply(const C* from, int64_t image, int64_t channel, int64_t y, int64_t x) const {
    const C* weight[ROWS];
    Vec<C> acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      weight[i] = rows + (channel + i) * p.depth();
      const Vec<C> start = p.bias ? splat<C>(load_one(p.bias + channel + i)) : zero<C>();
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = start;
    }
    const int64_t depth = p.depth();
    for (int64_t k = 0; k < depth; ++k) {
      const C* tap = from + offsets[k];
      Vec<C> pixels[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) pixels[j] = load(tap + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Vec<C> w = splat<C>(weight[i][k]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(w, pixels[j], acc[i][j]);
      }
    }
    const ImageStrides& st = p.target_strides;
    const int64_t place = image * st.image + channel * st.channel + y * st.row + x * st.column;
    store_rows<T, ROWS, VECTORS>(acc, p, p.OW - x, st.column, [&](int i) { return place + i * st.channel; });
  }
};

template <class T>
void conv2d_rows_nchw(const Conv2dPass<T>& p) {
  const WeightRows<T> rows(p);
  const RowsNchw<T> kernel(p, rows.data);
  TaskQueue queue(kernel.tasks());
  parallel(worth_threads(p.threads, p.flops(), 0), [&](int, int) {
    Scratch<Compute<T>> block(kernel.block_size());
    for (int64_t task; queue.take(task);) kernel.run(task, block);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

// Convolution in NCHW of few channels a group (stems, grouped), as an implicit GEMM whose B is never packed.
//
// A band of padded rows, split by phase of the stride (conv2d_block.inl), holds every pixel once; under a tap the 16 pixels
// of a tile (AVX2) are two plain loads from there, at an offset that depends on (channel, tap) alone. So where the panels
// of conv2d_implicit_nchw.inl copy a pixel once for each tap, here it is copied once for each band of output rows, and the
// sums of a whole depth stay in registers.
//
// Tiles of 6 output channels x 2 vectors of pixels: of one row, or, where rows would leave vectors empty, of the band's
// rows as one line, whose padding is computed and not stored. What a tile reads stays in L1, the band in L2: FMA-bound. Deep
// problems do not fit there, and from L2 these scattered loads are slower than the panels' one stream.
#pragma once

#include "cpu/conv2d_block.inl"
#include "cpu/conv2d_pixels.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct BandNchw {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, NR = kNR<C>;
  static constexpr int64_t kReach = 24576, kBlock = 65536;  // bytes: of what one row of outputs reads, of a band
  const Conv2dPass<T>& p;
  const C* rows;  // weights, [groups * out][depth]
  bool line;      // all rows of the band as one line
  PhaseBlock<T> block;
  int64_t band = 1, bands;  // output rows of a band

  static int64_t row_vectors(const Conv2dPass<T>& p) { return (p.OW + L - 1) / L; }
  static bool in_one_line(const Conv2dPass<T>& p) {
    const TapBox box(p);
    return row_vectors(p) * L * 15 >= (p.OW + (box.x1 - box.x0) / p.step_w) * 16;
  }
  BandNchw(const Conv2dPass<T>& pass, const C* weight_rows)
      : p(pass),
        rows(weight_rows),
        line(in_one_line(pass)),
        block(pass, line ? pass.OW : row_vectors(pass) * L, line, pass.in) {
    const int64_t most = p.threads > 1 ? std::max<int64_t>(p.OH * p.N * p.groups / (4 * p.threads), 1) : p.OH;
    const int64_t room = std::max(kBlock, 2 * block.bytes(p.in, 1));
    while (band < std::min(p.OH, most) && block.bytes(p.in, band + 1) <= room) ++band;
    bands = (p.OH + band - 1) / band;
    band = (p.OH + bands - 1) / bands;
    block.set_band(p.in, band);
  }

  // Whether taps share pixels, and what one row of outputs reads fits L1, as do the tile's weights; L2 is enough for few
  // output channels, which would not pay for packing a panel.
  static bool serves(const Conv2dPass<T>& p) {
    const bool few = p.out <= 8;
    if (p.tap_count == 1 || p.in == 0 || p.out < 3 || (p.depth() > 512 && !few)) return false;
    return PhaseBlock<T>(p, p.OW, true, 0).bytes(p.in, 1) <= (few ? 262144 : kReach);
  }

  int64_t tasks() const { return p.N * p.groups * bands; }

  void run(int64_t task, C* memory) const {
    const int64_t image = task / (p.groups * bands), group = task / bands % p.groups;
    const int64_t y0 = task % bands * band, y1 = std::min(y0 + band, p.OH);
    if (y0 >= y1) return;
    block.fill(image, group * p.in, p.in, y0, y1, memory);
    const EvenRows tiles(p.out);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t channel = group * p.out + tiles.begin(tile);
      with_exact_rows(tiles.begin(tile + 1) - tiles.begin(tile), [&](auto height) {
        constexpr int ROWS = decltype(height)::value;
        line ? along_line<ROWS>(memory, image, channel, y0, y1) : along_rows<ROWS>(memory, image, channel, y0, y1);
      });
    }
  }

  template <int ROWS>
  void along_rows(const C* memory, int64_t image, int64_t channel, int64_t y0, int64_t y1) const {
    for (int64_t y = y0; y < y1; ++y) {
      const C* from = memory + (y - y0) * block.pitch;
      int64_t x = 0;
      for (; x + L < p.OW; x += 2 * L) row_tile<ROWS, 2>(from + x, image, channel, y, x);
      if (x < p.OW) row_tile<ROWS, 1>(from + x, image, channel, y, x);
    }
  }
  template <int ROWS, int VECTORS>
  void row_tile(const C* from, int64_t image, int64_t channel, int64_t y, int64_t x) const {
    Vec<C> acc[ROWS][VECTORS];
    multiply<ROWS, VECTORS>(channel, from, acc);
    const ImageStrides& st = p.target_strides;
    const int64_t place = image * st.image + channel * st.channel + y * st.row + x * st.column;
    store_rows<T, ROWS, VECTORS>(acc, p, p.OW - x, st.column, [&](int i) { return place + i * st.channel; });
  }

  template <int ROWS>
  void along_line(const C* memory, int64_t image, int64_t channel, int64_t y0, int64_t y1) const {
    const int64_t count = (y1 - y0 - 1) * block.pitch + p.OW;
    for (int64_t q = 0; q < count; q += NR) {
      const PixelTile<C> place = line_pixels(image, y0, y1, q, std::min<int64_t>(NR, count - q));
      if (place.cols > L)
        line_tile<ROWS, 2>(memory + q, channel, place);
      else
        line_tile<ROWS, 1>(memory + q, channel, place);
    }
  }
  template <int ROWS, int VECTORS>
  void line_tile(const C* from, int64_t channel, const PixelTile<C>& place) const {
    Vec<C> acc[ROWS][VECTORS];
    multiply<ROWS, VECTORS>(channel, from, acc);
    store_pixels<T, ROWS, VECTORS>(acc, p, channel, place);
  }

  // The outputs among positions q … q + cols of the band y0 … y1.
  PixelTile<C> line_pixels(int64_t image, int64_t y0, int64_t y1, int64_t q, int64_t cols) const {
    PixelTile<C> tile;
    tile.cols = cols, tile.end = y1;
    int64_t y = q / block.pitch, x = q % block.pitch;
    for (int64_t column = 0; column < cols; ++y) {
      const int64_t in_row = std::min(block.pitch - x, cols - column), n = std::min(p.OW - x, in_row);
      if (n > 0) tile.runs[tile.count++] = {image, y0 + y, x, static_cast<int32_t>(column), static_cast<int32_t>(n)};
      column += in_row, x = 0;
    }
    tile.find_together(p);
    return tile;
  }

  template <int ROWS, int VECTORS>
  FASTNN_INLINE void multiply(int64_t channel, const C* from, Vec<C> (&acc)[ROWS][VECTORS]) const {
    const C* weight[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      weight[i] = rows + (channel + i) * p.depth();
      const Vec<C> start = p.bias ? splat<C>(load_one(p.bias + channel + i)) : zero<C>();
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = start;
    }
    const int64_t depth = p.depth();
    for (int64_t k = 0; k < depth; ++k) {
      const C* tap = from + block.offsets[k];
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
  }
};

template <class T>
void conv2d_band_nchw(const Conv2dPass<T>& p) {
  const WeightRows<T> rows(p);
  const BandNchw<T> kernel(p, rows.data);
  TaskQueue queue(kernel.tasks());
  parallel(worth_threads(p.threads, p.flops(), 0), [&](int, int) {
    Scratch<Compute<T>> memory(kernel.block.size(p.in));
    for (int64_t task; queue.take(task);) kernel.run(task, memory);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

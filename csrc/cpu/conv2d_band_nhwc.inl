// Convolution in NHWC of few channels a group (stems, grouped, 16-bit inputs), as an implicit GEMM over padded rows.
//
// A band of input rows of one group is copied once into [rows][columns][in], zero-padded and in compute type. The pixels
// of a tile then lie at one distance from each other, and the taps of a kernel row, for each of them, are one run of
// taps * in elements: no list of pointers and no copy of every patch, which for a few channels cost more than the sums.
//
// Tiles of 6 pixels x 2 vectors of output channels, or 12 x 1 where a group's fit one vector; weights are packed as for
// conv2d_implicit_nhwc.inl. Bound by FMAs, with one vector by the loads, one an FMA.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Calls f(integral_constant<ROWS>) for exactly `rows` (1 … MOST).
template <int MOST, class F>
FASTNN_INLINE void with_rows_to(int64_t rows, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    ((rows == I + 1 && (f(std::integral_constant<int, I + 1>{}), true)) || ...);
  }(std::make_integer_sequence<int, MOST>{});
}

template <class T>
struct BandNhwc {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, NR = kNR<C>, kOneVector = 12;
  static constexpr int64_t kBlock = 65536;  // bytes of a band
  // Taps of one kernel row that lie next to each other.
  struct Segment {
    int64_t offset, depth;
  };
  const Conv2dPass<T>& p;
  const C* packed;
  const C* bias;  // [groups][panels * NR]
  TapBox box;
  int64_t width, row;       // columns of the block, elements of a row
  int64_t band = 1, bands;  // output rows of a band
  int64_t panels;
  Scratch<Segment> segments;
  int64_t segment_count = 0;

  BandNhwc(const Conv2dPass<T>& pass, const C* weights, const C* padded_bias)
      : p(pass), packed(weights), bias(padded_bias), box(pass), segments(pass.tap_count) {
    width = columns(p, box), row = width * p.in;
    const int64_t most = p.threads > 1 ? std::max<int64_t>(p.OH * p.N * p.groups / (4 * p.threads), 1) : p.OH;
    const int64_t room = std::max(kBlock / int64_t(sizeof(C)), 2 * rows(1) * row);
    while (band < std::min(most, p.OH) && rows(band + 1) * row <= room) ++band;
    bands = (p.OH + band - 1) / band;
    band = (p.OH + bands - 1) / bands;
    panels = (p.out + NR - 1) / NR;
    for (int64_t t = 0; t < p.tap_count; ++t) {
      const int64_t offset = (p.taps[t].dy - box.y0) * row + (p.taps[t].dx - box.x0) * p.in;
      Segment* last = segment_count ? segments + segment_count - 1 : nullptr;
      if (last && last->offset + last->depth == offset)
        last->depth += p.in;
      else
        segments[segment_count++] = {offset, p.in};
    }
  }

  static int64_t columns(const Conv2dPass<T>& p, const TapBox& box) {
    return (p.OW - 1) * p.step_w + box.x1 - box.x0 + 1;
  }
  int64_t rows(int64_t outputs) const { return (outputs - 1) * p.step_h + box.y1 - box.y0 + 1; }

  // Whether patches would have to be copied, are many short runs, or meet few output channels (a tile of six pixels would
  // then wait for its own sums), and the rows of one output row fit L2.
  static bool serves(const Conv2dPass<T>& p) {
    const bool few = p.out <= L;
    if (p.tap_count == 1 || p.in == 0) return false;
    if (!few && (p.depth() > 512 || (std::is_same_v<T, C> && p.in > 32)))
      return false;  // a panel of weights stays in L1
    const TapBox box(p);
    return columns(p, box) * p.in * (box.y1 - box.y0 + 1) * int64_t(sizeof(C)) <= (few ? 262144 : kBlock);
  }

  int64_t tasks() const { return p.N * p.groups * bands; }
  int64_t block_size() const { return rows(band) * row + L; }

  void run(int64_t task, C* block) const {
    const int64_t image = task / (p.groups * bands), group = task / bands % p.groups;
    const int64_t y0 = task % bands * band, y1 = std::min(y0 + band, p.OH);
    if (y0 >= y1) return;
    fill(image, group, y0, y1, block);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t cols = std::min<int64_t>(NR, p.out - panel * NR);
      const C* b = packed + (group * panels + panel) * p.depth() * NR;
      const C* start = bias + (group * panels + panel) * NR;
      const int64_t most = cols <= L ? kOneVector : kTileRows, tiles = (p.OW + most - 1) / most;
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t x = p.OW * tile / tiles, height = p.OW * (tile + 1) / tiles - x;
          const C* from = block + (y - y0) * p.step_h * row + x * p.step_w * p.in;
          const ImageStrides& st = p.target_strides;
          const int64_t at = image * st.image + y * st.row + x * st.column + group * p.out + panel * NR;
          if (cols <= L)
            with_rows_to<kOneVector>(height,
                                     [&](auto h) { multiply<decltype(h)::value, 1>(from, b, start, at, cols); });
          else
            with_rows_to<kTileRows>(height, [&](auto h) { multiply<decltype(h)::value, 2>(from, b, start, at, cols); });
        }
    }
  }

  // In ascending order: each copy writes up to a vector too much.
  void fill(int64_t image, int64_t group, int64_t y0, int64_t y1, C* to) const {
    const ImageStrides& st = p.source_strides;
    const int64_t low = std::clamp<int64_t>(-box.x0, 0, width), high = std::clamp<int64_t>(p.W - box.x0, low, width);
    const int64_t top = y0 * p.step_h + box.y0;
    for (int64_t y = top; y < top + rows(y1 - y0); ++y, to += row) {
      if (y < 0 || y >= p.H) {
        zero_over(to, row);
        continue;
      }
      const T* from = p.source + image * st.image + y * st.row + (box.x0 + low) * st.column + group * p.in;
      zero_over(to, low * p.in);
      if (st.column == p.in)
        copy_over(to + low * p.in, from, (high - low) * p.in, p.source_end);
      else
        for (int64_t x = low; x < high; ++x, from += st.column) copy_over(to + x * p.in, from, p.in, p.source_end);
      zero_over(to + high * p.in, (width - high) * p.in);
    }
  }

  template <int ROWS, int VECTORS>
  void multiply(const C* from, const C* __restrict b, const C* start, int64_t at, int64_t cols) const {
    Vec<C> acc[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = load(start + j * L);
    const int64_t step = p.step_w * p.in;
    for (const Segment* s = segments; s != segments + segment_count; ++s) {
      const C* a = from + s->offset;
      for (const C* const end = a + s->depth; a != end; ++a, b += NR) {
        Vec<C> column[VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) column[j] = load(b + j * L);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
          const Vec<C> x = splat<C>(a[i * step]);
#pragma GCC unroll 2
          for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(x, column[j], acc[i][j]);
        }
      }
    }
    store_rows<T, ROWS, VECTORS>(acc, p, cols, 1, [&](int i) { return at + i * p.target_strides.column; });
  }
};

template <class T>
void conv2d_band_nhwc(const Conv2dPass<T>& p, const Compute<T>* packed, Compute<T>* bias) {
  const BandNhwc<T> kernel(p, packed, bias);
  TaskQueue queue(kernel.tasks());
  parallel(worth_threads(p.threads, p.flops(), 0), [&](int, int) {
    Scratch<Compute<T>> block(kernel.block_size());
    for (int64_t task; queue.take(task);) kernel.run(task, block);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

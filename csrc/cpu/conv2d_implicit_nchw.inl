// Convolution in NCHW as an implicit GEMM: [out, in * taps] x [in * taps, pixels] for each group.
//
// Vectors run along pixels, over all images' pixels as one row. A panel [depth][NR] of NR pixels is gathered while it is
// packed: for each (channel, tap) a few overlapping vector copies ("pieces"), worked out once for the panel and used
// for every channel. Weights are read where they lie: a row of A is one output channel's (c, r, s) run. 1x1 without
// stride is the same kernel with one tap, its pieces whole rows of the panel.
//
// Blocks: KC channels * taps (~768 deep, panel 48 KiB, see gemm.inl), some panels at a time (L2), MB rows of weights (L2).
// The order of summation depends on the shape alone. FMA-bound from ~32 output channels on; gathering a panel costs as
// much as 4 to 8 output channels.
#pragma once

#include "cpu/conv2d_pixels.inl"

namespace fastnn::cpu::FASTNN_ISA {

// One vector-wide copy into a panel. Pieces come in ascending order of `to`, and each writes NR elements: what it writes
// too much is overwritten by the next, the last one's runs into the next row of the panel.
struct Piece {
  int32_t to, count;
  int64_t from;  // < 0: zeros
};

// Splits pixels q0 … q0 + cols of all images' grids in a row into runs of at most `longest`; returns their number.
inline int split_pixels(int64_t q0, int64_t cols, int64_t OH, int64_t OW, int64_t longest, PixelRun* runs) {
  int64_t image = q0 / (OH * OW), rest = q0 % (OH * OW), y = rest / OW, x = rest % OW;
  int count = 0;
  for (int64_t column = 0; column < cols;) {
    const int64_t n = std::min({OW - x, cols - column, longest});
    runs[count++] = {image, y, x, static_cast<int32_t>(column), static_cast<int32_t>(n)};
    column += n, x += n;
    if (x < OW) continue;
    x = 0;
    if (++y == OH) y = 0, ++image;
  }
  return count;
}

template <class T>
PixelTile<Compute<T>> panel_pixels(const Conv2dPass<T>& p, int64_t q0, int64_t cols) {
  PixelTile<Compute<T>> tile;
  tile.count = split_pixels(q0, cols, p.OH, p.OW, cols, tile.runs);
  tile.cols = cols;
  tile.find_together(p);
  return tile;
}

// The pieces of `width` columns, of which `cols` are pixels, for all taps of a channel: tap t's go to columns
// t * width …. Runs are at most NR long. Returns the pieces' number; `farthest` is the largest `from`.
template <class T>
int64_t plan_pieces(const Conv2dPass<T>& p, const PixelRun* runs, int run_count, int64_t cols, int64_t width,
                    Piece* pieces, int64_t& farthest) {
  constexpr int NR = kNR<Compute<T>>;
  const ImageStrides& st = p.source_strides;
  int64_t n = 0;
  farthest = 0;
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const int64_t base = t * width;
    auto add = [&](int64_t column, int64_t count, int64_t from) {
      pieces[n++] = {static_cast<int32_t>(base + column), static_cast<int32_t>(count), from};
    };
    for (const PixelRun* run = runs; run != runs + run_count; ++run) {
      const int64_t y = run->y * p.step_h + p.taps[t].dy, x = run->x * p.step_w + p.taps[t].dx;
      // Columns [low, high) of the run lie inside the image.
      int64_t low = x >= 0 ? 0 : (-x + p.step_w - 1) / p.step_w;
      int64_t high = x >= p.W ? 0 : (p.W - x + p.step_w - 1) / p.step_w;
      if (y < 0 || y >= p.H) high = 0;
      high = std::min<int64_t>(high, run->count);
      if (high <= low) {
        add(run->column, 0, -1);
        continue;
      }
      if (low > 0) add(run->column, 0, -1);
      const int64_t from = run->image * st.image + y * st.row + (x + low * p.step_w) * st.column;
      farthest = std::max(farthest, from);
      add(run->column + low, high - low, from);
      if (high < run->count) add(run->column + high, 0, -1);
    }
    for (int64_t column = cols; column < width; column += NR) add(column, 0, -1);
  }
  return n;
}
// Room for what plan_pieces writes.
inline int64_t most_pieces(int64_t taps, int64_t runs, int64_t width, int64_t NR) {
  return taps * (3 * runs + width / NR + 1);
}

// Channels of one panel, [channels][taps][width], from `source` (of the first channel). STEP is step_w, 0 for any.
// Writes up to NR elements past the panel's end.
template <int STEP, class T>
void gather_columns(const Conv2dPass<T>& p, const T* source, int64_t channels, const Piece* pieces, int64_t count,
                    int64_t farthest, int64_t width, Compute<T>* panel) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>, NR = kNR<C>;
  for (int64_t c = 0; c < channels; ++c, source += p.source_strides.channel, panel += p.tap_count * width) {
    const bool wide = STEP > 0 && source + farthest + STEP * NR <= p.source_end;
    for (const Piece* piece = pieces; piece != pieces + count; ++piece) {
      C* to = panel + piece->to;
      const T* from = source + piece->from;
      if (piece->from < 0) {
        store(to, zero<C>());
        store(to + L, zero<C>());
      } else if (wide && STEP == 1) {
        const Vec<C> a = load(from), b = load(from + L);
        store(to, a);
        store(to + L, b);
      } else if (wide && STEP == 2) {
        const Vec<C> a = load_even(from), b = load_even(from + 2 * L);
        store(to, a);
        store(to + L, b);
      } else {
        for (int32_t i = 0; i < piece->count; ++i) to[i] = load_one(from + i * p.step_w);
      }
    }
  }
}

template <class T>
void gather_panel(const Conv2dPass<T>& p, const T* source, int64_t channels, const Piece* pieces, int64_t count,
                  int64_t farthest, int64_t width, Compute<T>* panel) {
  if (p.step_w == 1) return gather_columns<1>(p, source, channels, pieces, count, farthest, width, panel);
  if (p.step_w == 2) return gather_columns<2>(p, source, channels, pieces, count, farthest, width, panel);
  gather_columns<0>(p, source, channels, pieces, count, farthest, width, panel);
}

// Rows of patches, [channels][taps][width], of up to `width` pixels of all images: for the gradients of the weight.
template <class T>
struct PatchRows {
  using C = Compute<T>;
  static constexpr int64_t NR = kNR<C>;
  const Conv2dPass<T>& p;
  int64_t width, most_runs;
  Scratch<PixelRun> runs;
  Scratch<Piece> pieces;

  // width: a whole number of NR.
  PatchRows(const Conv2dPass<T>& pass, int64_t row_width)
      : p(pass),
        width(row_width),
        most_runs(std::min(width, width / std::min(p.OW, NR) + width / p.OW + 2)),
        runs(most_runs),
        pieces(most_pieces(p.tap_count, most_runs, width, NR)) {}
  int64_t size(int64_t channels) const { return channels * p.tap_count * width + NR; }

  // Pixels q … q + cols under each tap, channels from `source` on; zeros up to `width`.
  void gather(const T* source, int64_t channels, int64_t q, int64_t cols, C* to) const {
    const int count = split_pixels(q, cols, p.OH, p.OW, NR, runs);
    int64_t farthest;
    const int64_t n = plan_pieces(p, runs.data(), count, cols, width, pieces.data(), farthest);
    gather_panel(p, source, channels, pieces.data(), n, farthest, width, to);
  }
};

// The panel when pixels lie in one row and there is one tap: channel by channel over all panels of a block, so that
// memory is read in long runs.
template <class T>
void gather_rows(const T* source, int64_t channel_stride, int64_t channels, int64_t pixels, Compute<T>* panels,
                 int64_t panel_size) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>, NR = kNR<C>;
  for (int64_t c = 0; c < channels; ++c, source += channel_stride, panels += NR) {
    C* to = panels;
    int64_t i = 0;
    for (; i + NR <= pixels; i += NR, to += panel_size) {
      store(to, load(source + i));
      store(to + L, load(source + i + L));
    }
    if (i < pixels) {
      store(to, load_first(source + i, pixels - i));
      store(to + L, pixels - i > L ? load_first(source + i + L, pixels - i - L) : zero<C>());
    }
  }
}

template <class T>
struct ImplicitNchw {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, NR = kNR<C>, kFewPixels = 2;
  const Conv2dPass<T>& p;
  const C* rows;  // [groups * out][depth]
  int64_t pixels, panels, per_block, blocks, channels, splits;
  bool in_rows;  // 1x1, stride 1: see gather_rows

  ImplicitNchw(const Conv2dPass<T>& pass, const C* weight_rows) : p(pass), rows(weight_rows) {
    pixels = p.N * p.OH * p.OW;
    panels = (pixels + NR - 1) / NR;
    const int64_t parts = std::max<int64_t>((p.depth() + 767) / 768, 1);
    channels = std::max<int64_t>((p.in + parts - 1) / parts, 1);  // a function of the shape alone
    const int64_t panel_bytes = channels * p.tap_count * NR * int64_t(sizeof(C));
    per_block = std::clamp<int64_t>(196608 / std::max<int64_t>(panel_bytes, 1), 1, 16);
    blocks = (panels + per_block - 1) / per_block;
    per_block = (panels + blocks - 1) / blocks;
    // With few blocks of pixels the output channels are shared out too; each share packs the panels again.
    splits = 1;
    if (p.threads > 1 && blocks * p.groups < 2 * p.threads)
      splits = std::clamp<int64_t>((2 * p.threads + blocks * p.groups - 1) / (blocks * p.groups), 1,
                                   std::max<int64_t>(p.out / (4 * kTileRows), 1));
    in_rows = p.tap_count == 1 && p.OH == 1 && p.step_w == 1 && p.taps[0].dy == 0 && p.taps[0].dx == 0 && p.H == 1 &&
              p.W == p.OW;
  }

  int64_t tasks() const { return p.groups * blocks * splits; }

  void run(int64_t task) const {
    const int64_t group = task / (blocks * splits), block = task / splits % blocks, split = task % splits;
    const int64_t m_begin = p.out * split / splits, m_end = p.out * (split + 1) / splits;
    const int64_t first = block * per_block, last = std::min(first + per_block, panels);
    if (first >= last) return;
    const int64_t width = (last - first) * NR, panel_size = channels * p.tap_count * NR;
    const bool one_block = channels >= p.in;
    Scratch<C> packed(panel_size * (last - first) + NR);
    Scratch<C> sums(one_block ? 0 : (m_end - m_begin) * width);
    Scratch<C> columns(kFewPixels * channels * p.tap_count);
    Scratch<Piece> pieces(
        in_rows && p.N == 1 ? 0 : most_pieces(p.tap_count, std::min<int64_t>(NR, runs_of_panel()), NR, NR));
    const int64_t MB = std::max<int64_t>(131072 / (channels * p.tap_count * int64_t(sizeof(C))) / kTileRows, 1);
    const EvenRows tiles(m_end - m_begin);

    int64_t c = 0;
    do {
      const int64_t n = std::min(channels, p.in - c), depth = n * p.tap_count;
      gather(group, c, n, first, last, packed, panel_size, pieces);
      const int64_t rest = std::min(last * NR, pixels) - (last - 1) * NR;  // pixels of the last panel
      if (rest <= kFewPixels)
        for (int64_t i = 0; i < rest * depth; ++i)
          columns[i] = packed[(last - 1 - first) * panel_size + i % depth * NR + i / depth];
      for (int64_t tile_block = 0; tile_block < tiles.tiles; tile_block += MB)
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t cols = std::min<int64_t>(NR, pixels - panel * NR);
          const PixelTile<C> place = panel_pixels(p, panel * NR, cols);
          const C* b = packed + (panel - first) * panel_size;
          const C* column = cols <= kFewPixels ? columns.data() : nullptr;
          for (int64_t tile = tile_block; tile < std::min(tile_block + MB, tiles.tiles); ++tile) {
            const int64_t m = m_begin + tiles.begin(tile), height = tiles.begin(tile + 1) - tiles.begin(tile);
            C* partial = one_block ? nullptr : sums + (m - m_begin) * width + (panel - first) * NR;
            const C* a[kTileRows];
            for (int64_t i = 0; i < height; ++i) a[i] = rows + (group * p.out + m + i) * p.depth() + c * p.tap_count;
            with_exact_rows(height, [&](auto h) {
              constexpr int ROWS = decltype(h)::value;
              if (cols <= L)
                multiply<ROWS, 1>(a, depth, b, partial, width, c == 0, c + n >= p.in, group * p.out + m, place, column);
              else
                multiply<ROWS, 2>(a, depth, b, partial, width, c == 0, c + n >= p.in, group * p.out + m, place, column);
            });
          }
        }
      c += std::max<int64_t>(n, 1);
    } while (c < p.in);
  }

  // At most this many runs are in a panel.
  int64_t runs_of_panel() const { return (NR + p.OW - 2) / p.OW + 1; }

  void gather(int64_t group, int64_t c, int64_t n, int64_t first, int64_t last, C* packed, int64_t panel_size,
              Piece* pieces) const {
    const T* source = p.source + (group * p.in + c) * p.source_strides.channel;
    if (in_rows && p.N == 1)
      return gather_rows(source + first * NR, p.source_strides.channel, n, std::min(last * NR, pixels) - first * NR,
                         packed, panel_size);
    for (int64_t panel = first; panel < last; ++panel, packed += panel_size) {
      const int64_t cols = std::min<int64_t>(NR, pixels - panel * NR);
      const PixelTile<C> place = panel_pixels(p, panel * NR, cols);
      int64_t farthest;
      const int64_t count = plan_pieces(p, place.runs, place.count, cols, NR, pieces, farthest);
      gather_panel(p, source, n, pieces, count, farthest, NR, packed);
    }
  }

  // A panel of one or two pixels, as 7 x 7 leaves one, would cost two thirds of a full one: their sums are dot products
  // along the weights' rows, with the pixels' columns next to each other.
  template <int ROWS, int VECTORS>
  FASTNN_INLINE void add_dots(const C* const* a, int64_t depth, const C* columns, int64_t count,
                              Vec<C> (&acc)[ROWS][VECTORS]) const {
    for (int64_t j = 0; j < count; ++j, columns += depth) {
      Vec<C> sums[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) sums[i] = zero<C>();
      for (int64_t k = 0; k < depth; k += L) {
        const int64_t n = depth - k;
        const Vec<C> x = load_first(columns + k, n);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) sums[i] = fma(load_first(a[i] + k, n), x, sums[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) acc[i][0][j] += reduce_add<C>(sums[i]);
    }
  }

  template <int ROWS, int VECTORS>
  void multiply(const C* const* a, int64_t depth, const C* b, C* partial, int64_t partial_stride, bool first, bool last,
                int64_t channel, const PixelTile<C>& place, const C* column) const {
    Vec<C> acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j)
        acc[i][j] = !first   ? load(partial + i * partial_stride + j * L)
                    : p.bias ? splat<C>(load_one(p.bias + channel + i))
                             : zero<C>();
    if (VECTORS == 1 && column)
      add_dots<ROWS, VECTORS>(a, depth, column, place.cols, acc);
    else
      tile_kernel<C, ROWS, VECTORS>(1, a, depth, b, acc);
    if (!last) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) store(partial + i * partial_stride + j * L, acc[i][j]);
      return;
    }
    store_pixels<T, ROWS, VECTORS>(acc, p, channel, place);
  }
};

template <class T>
void conv2d_implicit_nchw(const Conv2dPass<T>& p) {
  const WeightRows<T> rows(p);
  const ImplicitNchw<T> kernel(p, rows.data);
  for_each_task(kernel.tasks(), worth_threads(p.threads, p.flops(), 0), [&](int64_t task) { kernel.run(task); });
}

}  // namespace fastnn::cpu::FASTNN_ISA

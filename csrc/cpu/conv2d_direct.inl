// Convolution without a GEMM, for groups of few channels: depthwise, with a depth multiplier, and its gradient.
//
// NCHW: vectors along the pixels of a row, read from a padded block in L1 (conv2d_block.inl). A tile is 1x8 … 8x1
// vectors of output rows x columns, 8 accumulators.
// NHWC: vectors along output channels, a tile is 4 pixels x 2 vectors. Depthwise reads the input where it lies, with the
// taps that fall outside dropped from the list (per row, and per pixel at the left and right border). Other groups
// first spread a band of rows so that lane k holds the input channel of output channel k, once for each channel a group.
//
// Bound by memory for 3x3 depthwise; by loads (one a multiply-add) where many taps or channels meet.
#pragma once

#include "cpu/conv2d_block.inl"
#include "cpu/conv2d_depthwise.inl"

namespace fastnn::cpu::FASTNN_ISA {

// ---- NCHW ----------------------------------------------------------------------------------------------------------

template <class T>
struct DirectNchw {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  const Conv2dPass<T>& p;
  const C* rows;            // weights, [groups * out][in * taps]
  int64_t band = 1, bands;  // output rows of a band
  PhaseBlock<T> block;

  DirectNchw(const Conv2dPass<T>& pass, const C* weight_rows)
      : p(pass), rows(weight_rows), block(pass, (pass.OW + L - 1) / L * L, false, pass.in) {
    while (band < p.OH && (band < 8 || block.bytes(p.in, band + 1) <= 32768)) ++band;  // L1
    bands = (p.OH + band - 1) / band;
    band = (p.OH + bands - 1) / bands;
    block.set_band(p.in, band);
  }

  // Whether there are too few output channels to pay for packing a panel, and eight rows of outputs read no more than L2.
  static bool serves(const Conv2dPass<T>& p) {
    return p.tap_count > 1 && p.in > 0 && p.out <= 2 && PhaseBlock<T>(p, p.OW, false, 0).bytes(p.in, 8) <= 262144;
  }

  int64_t tasks() const { return p.N * p.groups * bands; }
  int64_t block_size() const { return block.size(p.in); }

  void run(int64_t task, C* memory) const {
    const int64_t image = task / (p.groups * bands), group = task / bands % p.groups;
    const int64_t y0 = task % bands * band, y1 = std::min(y0 + band, p.OH);
    if (y0 >= y1) return;
    block.fill(image, group * p.in, p.in, y0, y1, memory);
    for (int64_t k = 0; k < p.out; ++k) {
      const int64_t channel = group * p.out + k;
      const int64_t at = image * p.target_strides.image + channel * p.target_strides.channel;
      for (int64_t x = 0; x < p.OW;) {
        const int64_t left = (p.OW - x + L - 1) / L;
        if (left >= 4) {
          column<4>(memory, y0, y1, x, channel, at), x += 4 * L;
        } else if (left >= 2) {
          column<2>(memory, y0, y1, x, channel, at), x += 2 * L;
        } else {
          column<1>(memory, y0, y1, x, channel, at), x += L;
        }
      }
    }
  }

  // VECTORS columns from x of all rows of the band.
  template <int VECTORS>
  void column(const C* memory, int64_t y0, int64_t y1, int64_t x, int64_t channel, int64_t at) const {
    int64_t y = y0;
    const C* from = memory + x;
    constexpr int MOST = 8 / VECTORS;
    for (; y + MOST <= y1; y += MOST) tile<MOST, VECTORS>(from + (y - y0) * block.pitch, y, x, channel, at);
    if constexpr (MOST > 4)
      for (; y + 4 <= y1; y += 4) tile<4, VECTORS>(from + (y - y0) * block.pitch, y, x, channel, at);
    if constexpr (MOST > 2)
      for (; y + 2 <= y1; y += 2) tile<2, VECTORS>(from + (y - y0) * block.pitch, y, x, channel, at);
    for (; y < y1; ++y) tile<1, VECTORS>(from + (y - y0) * block.pitch, y, x, channel, at);
  }

  template <int ROWS, int VECTORS>
  void tile(const C* from, int64_t y, int64_t x, int64_t channel, int64_t at) const {
    Vec<C> acc[ROWS][VECTORS];
    const Vec<C> start = p.bias ? splat<C>(load_one(p.bias + channel)) : zero<C>();
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = start;
    const C* weight = rows + channel * p.depth();
    const int64_t depth = p.depth(), down = block.pitch, *const offsets = block.offsets;
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<C> w = splat<C>(weight[k]);
      const C* tap = from + offsets[k];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(w, load(tap + i * down + j * L), acc[i][j]);
    }
    const ImageStrides& st = p.target_strides;
    const int64_t place = at + y * st.row + x * st.column;
    store_rows<T, ROWS, VECTORS>(acc, p, p.OW - x, st.column, [&](int i) { return place + i * st.row; });
  }
};

template <class T>
void conv2d_direct_nchw(const Conv2dPass<T>& p) {
  if (DepthwiseNchw<T>::serves(p)) return conv2d_depthwise_nchw(p);
  const WeightRows<T> rows(p);
  const DirectNchw<T> kernel(p, rows.data);
  TaskQueue queue(kernel.tasks());
  parallel(worth_threads(p.threads, p.flops(), 0), [&](int, int) {
    Scratch<Compute<T>> memory(kernel.block_size());
    for (int64_t task; queue.take(task);) kernel.run(task, memory);
  });
}

// ---- NHWC ----------------------------------------------------------------------------------------------------------

// Weights as [taps][in][channels], channels padded to whole vectors.
template <class T>
int64_t packed_size_direct_nhwc(const Conv2dPass<T>& p) {
  constexpr int L = kLanes<Compute<T>>;
  return p.depth() * ((p.groups * p.out + L - 1) / L * L);
}
template <class T>
void pack_direct_nhwc(const Conv2dPass<T>& p, Compute<T>* to) {
  constexpr int L = kLanes<Compute<T>>;
  const int64_t channels = p.groups * p.out;
  for (int64_t t = 0; t < p.tap_count; ++t)
    for (int64_t c = 0; c < p.in; ++c) {
      const T* from = p.weight + p.taps[t].weight + c * p.weight_in;
      for (int64_t group = 0; group < p.groups; ++group)
        for (int64_t k = 0; k < p.out; ++k) *to++ = load_one(from + group * p.weight_group + k * p.weight_out);
      for (int64_t k = channels; k % L; ++k) *to++ = Compute<T>(0);
    }
}

template <class C>
struct DirectTap {
  int64_t offset;   // of its pixel, elements
  const C* weight;  // [channels]
};

template <class T>
struct DirectNhwc {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  const Conv2dPass<T>& p;
  const C* weights;
  const C* bias;  // [padded]
  TapBox box;
  int64_t channels, padded;  // output channels; the same padded to whole vectors
  int64_t chunk, band;       // output channels and rows of one spread block
  bool regular;              // a vector of output channels draws on one vector of input channels, always alike
  Vec<Bits<C>> lanes;        // from these lanes of it, for the first channel of each group

  DirectNhwc(const Conv2dPass<T>& pass, const C* packed, const C* padded_bias)
      : p(pass), weights(packed), bias(padded_bias), box(pass) {
    channels = p.groups * p.out;
    padded = (channels + L - 1) / L * L;
    chunk = std::min<int64_t>(padded, 2 * L);
    band = most_rows(131072, 8);
    regular = (L % p.out == 0 && p.in <= p.out) || (p.out % L == 0 && p.in <= L);
    for (int i = 0; i < L; ++i) lanes[i] = p.out >= L ? 0 : i / p.out * p.in;
  }

  bool depthwise() const { return p.in == 1 && p.out == 1; }

  // Row y of the grid of one image, the input read where it lies.
  void depthwise_row(int64_t image, int64_t y, DirectTap<C>* taps) const {
    const ImageStrides& st = p.source_strides;
    const T* source = p.source + image * st.image;
    const int64_t at = image * p.target_strides.image + y * p.target_strides.row;
    // Pixels [left, right) see every tap's column inside the image.
    const int64_t left = std::clamp<int64_t>((-box.x0 + p.step_w - 1) / p.step_w, 0, p.OW);
    const int64_t right = std::clamp<int64_t>((p.W - 1 - box.x1 + p.step_w) / p.step_w, left, p.OW);
    auto list = [&](int64_t x, bool all) {
      int64_t n = 0;
      for (int64_t t = 0; t < p.tap_count; ++t) {
        const int64_t iy = y * p.step_h + p.taps[t].dy, ix = x * p.step_w + p.taps[t].dx;
        if (iy >= 0 && iy < p.H && (all || (ix >= 0 && ix < p.W)))
          taps[n++] = {iy * st.row + p.taps[t].dx * st.column, weights + t * padded};
      }
      return n;
    };
    auto span = [&](int64_t x0, int64_t x1, int64_t n) {
      const int64_t step = p.step_w * st.column;
      int64_t x = x0;
      for (; x + 4 <= x1; x += 4)
        pixels<4>(source, x * step, step, taps, n, 0, channels, at + x * p.target_strides.column);
      for (; x < x1; ++x) pixels<1>(source, x * step, step, taps, n, 0, channels, at + x * p.target_strides.column);
    };
    for (int64_t x = 0; x < left; ++x) span(x, x + 1, list(x, false));
    if (right > left) span(left, right, list(left, true));
    for (int64_t x = right; x < p.OW; ++x) span(x, x + 1, list(x, false));
  }

  // Rows y0 … y1 of `chunk` output channels of any group: the input rows that they need, spread over the lanes.
  // Rows of outputs whose spread block takes no more than `bytes`.
  int64_t most_rows(int64_t bytes, int64_t most) const {
    const int64_t row = spread_width() * p.in * chunk * int64_t(sizeof(C));
    return std::clamp<int64_t>((bytes / row - (box.y1 - box.y0)) / p.step_h, 1, std::min(p.OH, most));
  }
  int64_t spread_width() const { return (p.OW - 1) * p.step_w + box.x1 - box.x0 + 1; }
  int64_t spread_rows(int64_t rows) const { return (rows - 1) * p.step_h + box.y1 - box.y0 + 1; }
  int64_t spread_size() const { return spread_rows(band) * spread_width() * p.in * chunk; }
  int64_t spread_tasks() const { return p.N * ((p.OH + band - 1) / band) * ((channels + chunk - 1) / chunk); }

  void spread_band(int64_t task, DirectTap<C>* taps, C* spread) const {
    const int64_t bands = (p.OH + band - 1) / band, chunks = (channels + chunk - 1) / chunk;
    const int64_t image = task / (bands * chunks), y0 = task / chunks % bands * band, y1 = std::min(y0 + band, p.OH);
    const int64_t first = task % chunks * chunk, last = std::min(first + chunk, channels);
    const int64_t pixel = p.in * chunk, row = spread_width() * pixel, n = p.depth();
    spread_block(image, y0, y1, first, last, spread);
    list_taps(taps);
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t at = image * p.target_strides.image + y * p.target_strides.row;
      const C* source = spread + (y - y0) * p.step_h * row;
      int64_t x = 0;
      for (; x + 4 <= p.OW; x += 4)
        pixels<4>(source, x * p.step_w * pixel, p.step_w * pixel, taps, n, first, last,
                  at + x * p.target_strides.column);
      for (; x < p.OW; ++x)
        pixels<1>(source, x * p.step_w * pixel, p.step_w * pixel, taps, n, first, last,
                  at + x * p.target_strides.column);
    }
  }

  void spread_block(int64_t image, int64_t y0, int64_t y1, int64_t first, int64_t last, C* to) const {
    const ImageStrides& st = p.source_strides;
    const int64_t width = spread_width(), pixel = p.in * chunk, top = y0 * p.step_h + box.y0;
    const int64_t reach = (last - 1) / p.out * p.in + p.in + L;  // of a pixel's vector loads
    int64_t group[2];                                            // first input channel of the groups of each vector
    for (int i = 0; i < 2; ++i) group[i] = first + i * L < last ? (first + i * L) / p.out * p.in : 0;
    for (int64_t iy = top; iy < top + spread_rows(y1 - y0); ++iy)
      for (int64_t ix = box.x0; ix < box.x0 + width; ++ix, to += pixel) {
        if (iy < 0 || iy >= p.H || ix < 0 || ix >= p.W) {
          std::fill(to, to + pixel, C(0));
          continue;
        }
        const T* from = p.source + image * st.image + iy * st.row + ix * st.column;
        if (!regular || from + reach > p.source_end)
          spread_pixel(from, first, last, to);
        else
          for (int64_t m = 0; m < chunk; m += L) {
            const Vec<C> x = load(from + group[m / L]);
            for (int64_t c = 0; c < p.in; ++c)
              store(to + c * chunk + m, __builtin_shuffle(x, lanes + static_cast<Bits<C>>(c)));
          }
      }
  }

  // The (tap, channel) of a group in the spread block.
  void list_taps(DirectTap<C>* taps) const {
    const int64_t pixel = p.in * chunk, row = spread_width() * pixel;
    int64_t n = 0;
    for (int64_t t = 0; t < p.tap_count; ++t)
      for (int64_t c = 0; c < p.in; ++c, ++n)
        taps[n] = {(p.taps[t].dy - box.y0) * row + (p.taps[t].dx - box.x0) * pixel + c * chunk, weights + n * padded};
  }

  // Lane m of block c: the input channel c of the group of output channel first + m.
  void spread_pixel(const T* from, int64_t first, int64_t last, C* to) const {
    for (int64_t c = 0; c < p.in; ++c) {
      C* lane = to + c * chunk;
      int64_t group = first / p.out, k = first % p.out;
      for (int64_t m = first; m < last; ++m) {
        *lane++ = load_one(from + group * p.in + c);
        if (++k == p.out) k = 0, ++group;
      }
      for (; lane < to + (c + 1) * chunk; ++lane) *lane = C(0);
    }
  }

  // Channels first … last of PIXELS pixels, `step` apart in the source; source[0] is channel `first`.
  template <int PIXELS, class S>
  void pixels(const S* source, int64_t begin, int64_t step, const DirectTap<C>* taps, int64_t n, int64_t first,
              int64_t last, int64_t at) const {
    int64_t k = first;
    source += begin;
    for (; k + 2 * L <= last; k += 2 * L) block<PIXELS, 2>(source + k - first, step, taps, n, k, 2 * L, at);
    for (; k + L <= last; k += L) block<PIXELS, 1>(source + k - first, step, taps, n, k, L, at);
    if (k < last) block<PIXELS, 1>(source + k - first, step, taps, n, k, last - k, at);
  }
  template <int PIXELS, int VECTORS, class S>
  void block(const S* source, int64_t step, const DirectTap<C>* taps, int64_t n, int64_t k, int64_t cols,
             int64_t at) const {
    Vec<C> acc[PIXELS][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = load(bias + k + j * L);
    const bool whole = cols == VECTORS * L;
    for (int64_t t = 0; t < n; ++t) {
      const S* tap = source + taps[t].offset;
      Vec<C> w[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) w[j] = load(taps[t].weight + k + j * L);
#pragma GCC unroll 4
      for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) {
          const S* x = tap + i * step + j * L;
          acc[i][j] = fma(w[j], whole ? load(x) : load_first(x, cols), acc[i][j]);
        }
    }
    store_rows<T, PIXELS, VECTORS>(acc, p, cols, 1, [&](int i) { return at + i * p.target_strides.column + k; });
  }
};

template <class T>
void conv2d_direct_nhwc(const Conv2dPass<T>& p) {
  using C = Compute<T>;
  const int64_t channels = p.groups * p.out, padded = (channels + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
  Scratch<C> memory(p.packed ? 0 : packed_size_direct_nhwc(p)), bias(padded);
  if (!p.packed) pack_direct_nhwc(p, memory.data());
  for (int64_t k = 0; k < padded; ++k) bias[k] = p.bias && k < channels ? load_one(p.bias + k) : C(0);
  const DirectNhwc<T> kernel(p, p.packed ? p.packed : memory.data(), bias);
  TaskQueue queue(kernel.depthwise() ? p.N * p.OH : kernel.spread_tasks());
  parallel(worth_threads(p.threads, p.flops(), 0), [&](int, int) {
    Scratch<DirectTap<C>> taps(p.depth());
    Scratch<C> spread(kernel.depthwise() ? 0 : kernel.spread_size());
    for (int64_t task; queue.take(task);) {
      if (kernel.depthwise())
        kernel.depthwise_row(task / p.OH, task % p.OH, taps);
      else
        kernel.spread_band(task, taps, spread);
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

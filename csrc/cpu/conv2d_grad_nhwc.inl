// Gradient of the weight in NHWC: vectors along output channels; row i of the tile is input channel c + i, read for each
// pixel through the pointer of the tap (float, double) or from a gathered copy (16 bits). grad_output is packed
// [panel][pixels][NR], and the sums [tap][channel][panel] are transposed in blocks at the end.
//
// With few input channels the taps of a row are one tap of as many channels as their pixels have together: a stem's
// 7 x 7 x 3 are 7 taps of 21. Groups with few output channels share the pointers.
// FMA-bound; groups of 8 channels fill one vector, and each product then loads a splat of its own.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct GradWeightNhwc {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, NR = kNR<C>;
  static constexpr int64_t kPixels = 256, kPanels = 4;
  const Conv2dGradWeight<T>& g;
  const Conv2dPass<T>& p;
  int64_t merged;         // taps of a row that are one: a pixel's channels are then those of `merged` pixels
  Scratch<C> zeros;       // a pixel of all groups
  int64_t in, tap_count;  // channels of a group and taps, so counted
  int64_t pixels, panels, parts, splits;
  int64_t bundle;  // groups of a task: few outputs a group share what is worked out for a tap

  explicit GradWeightNhwc(const Conv2dGradWeight<T>& grad)
      : g(grad), p(grad.p), merged(row_of_taps()), zeros(p.groups * p.in * merged) {
    std::fill_n(zeros.data(), p.groups * p.in * merged, C(0));
    in = p.in * merged, tap_count = p.tap_count / merged;
    pixels = p.N * p.OH * p.OW;
    panels = (p.out + NR - 1) / NR;
    parts = (panels + kPanels - 1) / kPanels;
    bundle = std::clamp<int64_t>(kPanels / panels, 1, p.groups);
    splits = 1;
    if (p.threads > 1 && parts * bundles() < 2 * p.threads)
      splits = std::clamp<int64_t>((2 * p.threads + parts * bundles() - 1) / (parts * bundles()), 1,
                                   (in + 2 * kTileRows - 1) / (2 * kTileRows));
  }
  // Few channels of dense pixels: the taps of a row meet a run of memory, and the gradients of their weights are one too.
  int64_t row_of_taps() const {
    const bool dense = p.groups == 1 && p.in < L && p.source_strides.column == p.in && g.strides.channel == 1;
    int64_t n = 1;
    while (dense && n < p.tap_count && p.taps[n].dy == p.taps[0].dy && p.taps[n].dx == p.taps[0].dx + n &&
           p.taps[n].weight == n * p.in)
      ++n;
    return n;
  }
  int64_t bundles() const { return (p.groups + bundle - 1) / bundle; }
  int64_t tasks() const { return bundles() * parts * splits; }

  void run(int64_t task) const {
    const int64_t group0 = task / (parts * splits) * bundle, group1 = std::min(group0 + bundle, p.groups);
    const int64_t part = task / splits % parts, split = task % splits;
    const int64_t panel0 = part * kPanels, panel1 = std::min(panel0 + kPanels, panels);
    const int64_t c0 = in * split / splits, c1 = in * (split + 1) / splits;
    if (c0 >= c1 || panel0 >= panel1) return;
    const int64_t own = panel1 - panel0, wide = own * NR, depth = c1 - c0, count = (group1 - group0) * own;
    const int64_t reach = (group1 - group0 - 1) * in + depth;  // channels of a pixel
    constexpr bool in_place = std::is_same_v<T, C>;
    Scratch<C> sums(tap_count * depth * NR * count), grads(NR * kPixels * count);
    Scratch<C> copies(in_place && merged == 1 ? 0 : kPixels * reach);
    Scratch<const C*> pointers(kPixels);
    std::fill(sums.data(), sums.data() + tap_count * depth * NR * count, C(0));
    const EvenRows even(depth);
    for (int64_t q = 0; q < pixels; q += kPixels) {
      const int64_t n = std::min(kPixels, pixels - q);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t group = group0 + i / own, m = (panel0 + i % own) * NR;
        pack_panel<NR>(g.grad + q * p.target_strides.column + group * p.out + m, 1, p.target_strides.column,
                       std::min<int64_t>(NR, p.out - m), n, grads + i * NR * kPixels);
      }
      for (int64_t t = 0; t < tap_count; ++t) {
        point(q, n, t, group0 * in + c0, reach, pointers, copies);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t channel = i / own * in;
          const bool narrow = p.out - (panel0 + i % own) * NR <= L;
          for (int64_t tile = 0; tile < even.tiles; ++tile) {
            const int64_t c = even.begin(tile);
            const C* b = grads + i * NR * kPixels;
            C* to = sums + ((i / own * tap_count + t) * depth + c) * wide + i % own * NR;
            with_exact_rows(even.begin(tile + 1) - c, [&](auto h) {
              if (narrow)
                tile_sums<decltype(h)::value, 1>(pointers, channel + c, n, b, to, wide);
              else
                tile_sums<decltype(h)::value, 2>(pointers, channel + c, n, b, to, wide);
            });
          }
        }
      }
    }
    for (int64_t group = group0; group < group1; ++group)
      for (int64_t t = 0; t < tap_count; ++t)
        put(group, t, panel0 * NR, std::min(panel1 * NR, p.out), c0, c1,
            sums + ((group - group0) * tap_count + t) * depth * wide, wide);
  }

  // The gradients of outputs k0 … k1, channels c0 … c1 under tap t: from sums[c - c0][k - k0], by blocks transposed.
  void put(int64_t group, int64_t t, int64_t k0, int64_t k1, int64_t c0, int64_t c1, const C* sums,
           int64_t wide) const {
    for (int64_t k = k0; k < k1; k += L)
      for (int64_t c = c0; c < c1; c += L) {
        const C* const from = sums + (c - c0) * wide + k - k0;
        if (g.strides.channel == 1 && k + L <= k1 && c + L <= c1) {
          C* const to = g.grad_weight + (group * p.out + k) * g.strides.image + c + p.taps[t * merged].weight;
          Vec<C> rows[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) rows[i] = load(from + i * wide);
          transpose_in_place<C>(rows);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(to + i * g.strides.image, rows[i]);
          continue;
        }
        for (int64_t i = 0; i < std::min<int64_t>(L, k1 - k); ++i)
          for (int64_t j = 0; j < std::min<int64_t>(L, c1 - c); ++j)
            g.put(group, k + i, c + j, t * merged, from[j * wide + i]);
      }
  }

  // Where channel `channel` of each of n pixels lies under tap t; `depth` of them are read.
  void point(int64_t q, int64_t n, int64_t t, int64_t channel, int64_t depth, const C** pointers, C* copies) const {
    const ImageStrides& st = p.source_strides;
    const Tap& tap = p.taps[t * merged];
    int64_t image = q / (p.OH * p.OW), rest = q % (p.OH * p.OW), y = rest / p.OW, x = rest % p.OW;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t iy = y * p.step_h + tap.dy, ix = x * p.step_w + tap.dx;
      const T* from = p.source + image * st.image + iy * st.row + ix * st.column + channel;
      C* const copy = copies + i * depth;
      pointers[i] = copy;
      if (iy < 0 || iy >= p.H || ix + merged <= 0 || ix >= p.W) {
        pointers[i] = zeros;
      } else if (ix < 0 || ix + merged > p.W) {  // some pixels of a run
        const int64_t low = std::max<int64_t>(-ix * p.in - channel, 0);
        const int64_t high = std::min((p.W - ix) * p.in - channel, depth);
        for (int64_t c = 0; c < depth; ++c) copy[c] = c >= low && c < high ? load_one(from + c) : C(0);
      } else if constexpr (std::is_same_v<T, C>) {
        pointers[i] = from;
      } else {
        copy_run(copy, from, depth);
      }
      if (++x == p.OW) {
        x = 0;
        if (++y == p.OH) y = 0, ++image;
      }
    }
  }

  template <int ROWS, int VECTORS>
  static void tile_sums(const C* const* pointers, int64_t c, int64_t n, const C* __restrict b, C* sums,
                        int64_t stride) {
    Vec<C> acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = zero<C>();
    int64_t q = 0;
    if constexpr (VECTORS == 1) {  // a second set of accumulators, or the sums would wait for one another
      Vec<C> odd[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) odd[i] = zero<C>();
      for (; q + 2 <= n; q += 2, b += 2 * NR) {
        const C *pixel = pointers[q] + c, *next = pointers[q + 1] + c;
        const Vec<C> column = load(b), other = load(b + NR);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          acc[i][0] = fma(splat<C>(pixel[i]), column, acc[i][0]);
          odd[i] = fma(splat<C>(next[i]), other, odd[i]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) acc[i][0] += odd[i];
    }
    for (; q < n; ++q, b += NR) {
      const C* pixel = pointers[q] + c;
      Vec<C> column[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) column[j] = load(b + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Vec<C> x = splat<C>(pixel[i]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(x, column[j], acc[i][j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) {
        C* to = sums + i * stride + j * L;
        store(to, load(to) + acc[i][j]);
      }
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA

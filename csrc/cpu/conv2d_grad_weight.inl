// Gradient of the weight: for each group [out, pixels] x [pixels, in * taps], summed over the pixels of all images.
//
// NCHW: a GEMM (conv2d_grad_gemm.inl), or dot products where there are few weights: both operands are rows along pixels,
// the tile is 3 x 4 vector accumulators, reduced once a block of pixels. NHWC: conv2d_grad_nhwc.inl.
// Direct (few channels a group): dot products over padded rows (NCHW), sums along spread lanes (NHWC), see
// conv2d_direct.inl; depthwise on small images in NCHW: conv2d_depthwise.inl.
//
// A task owns some of the weights and walks all pixels, block after block: nothing depends on the number of threads.
#pragma once

#include "cpu/conv2d_grad_gemm.inl"
#include "cpu/conv2d_grad_nhwc.inl"
#include "cpu/conv2d_pass.inl"

namespace fastnn::cpu::FASTNN_ISA {

// ---- NCHW, dot products --------------------------------------------------------------------------------------------

// sums[i * stride + j] += a[i] · b[j] over `width` elements, whole vectors.
template <class C, int ROWS, int COLUMNS>
FASTNN_INLINE void dot_tile(const C* a, const C* b, int64_t width, C* sums, int64_t stride) {
  constexpr int L = kLanes<C>;
  Vec<C> acc[ROWS][COLUMNS];
#pragma GCC unroll 3
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) acc[i][j] = zero<C>();
  for (int64_t x = 0; x < width; x += L) {
    Vec<C> row[ROWS];
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) row[i] = load(a + i * width + x);
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      const Vec<C> column = load(b + j * width + x);
#pragma GCC unroll 3
      for (int i = 0; i < ROWS; ++i) acc[i][j] = fma(row[i], column, acc[i][j]);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) sums[i * stride + j] += reduce_add<C>(acc[i][j]);
}
template <class C, int ROWS>
void dot_columns(const C* a, const C* b, int64_t columns, int64_t width, C* sums, int64_t stride) {
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) dot_tile<C, ROWS, 4>(a, b + j * width, width, sums + j, stride);
  for (; j < columns; ++j) dot_tile<C, ROWS, 1>(a, b + j * width, width, sums + j, stride);
}

template <class T>
struct GradWeightNchw {
  using C = Compute<T>;
  static constexpr int NR = kNR<C>;
  static constexpr int64_t kRows = 12;  // of grad_output at a time: with a tile's columns they stay in L1
  const Conv2dGradWeight<T>& g;
  const Conv2dPass<T>& p;
  int64_t pixels, width, channels, parts, splits;

  explicit GradWeightNchw(const Conv2dGradWeight<T>& grad) : g(grad), p(grad.p) {
    pixels = p.N * p.OH * p.OW;
    width = std::min<int64_t>(2048 / int64_t(sizeof(C)), (pixels + NR - 1) / NR * NR);
    channels = std::clamp<int64_t>(131072 / (p.tap_count * width * int64_t(sizeof(C))), 1, std::max<int64_t>(p.in, 1));
    parts = (p.in + channels - 1) / channels;
    channels = (p.in + parts - 1) / std::max<int64_t>(parts, 1);
    splits = 1;
    if (p.threads > 1 && parts * p.groups < 2 * p.threads)
      splits = std::clamp<int64_t>((2 * p.threads + parts * p.groups - 1) / (parts * p.groups), 1,
                                   std::max<int64_t>(p.out / kRows, 1));
  }
  int64_t tasks() const { return p.groups * parts * splits; }

  void run(int64_t task) const {
    const int64_t group = task / (parts * splits), part = task / splits % parts, split = task % splits;
    const int64_t c0 = part * channels, c1 = std::min(c0 + channels, p.in);
    const int64_t m0 = p.out * split / splits, m1 = p.out * (split + 1) / splits;
    if (c0 >= c1 || m0 >= m1) return;
    const int64_t columns = (c1 - c0) * p.tap_count;
    const PatchRows<T> gathered(p, width);
    Scratch<C> patches(gathered.size(c1 - c0)), rows(kRows * width + NR), sums((m1 - m0) * columns);
    std::fill(sums.data(), sums.data() + (m1 - m0) * columns, C(0));
    for (int64_t q = 0; q < pixels; q += width) {
      const int64_t cols = std::min(width, pixels - q);
      gathered.gather(p.source + (group * p.in + c0) * p.source_strides.channel, c1 - c0, q, cols, patches);
      for (int64_t m = m0; m < m1; m += kRows) {
        const int64_t height = std::min(kRows, m1 - m);
        for (int64_t i = 0; i < height; ++i) gather_grad(q, cols, group * p.out + m + i, rows + i * width);
        for (int64_t i = 0; i < height; i += 3) {
          C* to = sums + (m - m0 + i) * columns;
          const C* a = rows + i * width;
          if (height - i >= 3)
            dot_columns<C, 3>(a, patches, columns, width, to, columns);
          else if (height - i == 2)
            dot_columns<C, 2>(a, patches, columns, width, to, columns);
          else
            dot_columns<C, 1>(a, patches, columns, width, to, columns);
        }
      }
    }
    for (int64_t m = m0; m < m1; ++m)
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t t = 0; t < p.tap_count; ++t)
          g.put(group, m, c, t, sums[(m - m0) * columns + (c - c0) * p.tap_count + t]);
  }

  // Pixels q … q + cols of one channel of grad_output, zero up to `width`.
  void gather_grad(int64_t q, int64_t cols, int64_t channel, C* to) const {
    const int64_t area = p.OH * p.OW;
    int64_t image = q / area, at = q % area;
    for (int64_t x = 0; x < cols; ++image, at = 0) {
      const int64_t n = std::min(area - at, cols - x);
      copy_run(to + x, g.grad + image * p.target_strides.image + channel * p.target_strides.channel + at, n);
      x += n;
    }
    std::fill(to + cols, to + width, C(0));
  }
};

// ---- direct --------------------------------------------------------------------------------------------------------

// One group, NCHW: grad rows and padded input rows lie in L1, up to five taps' dot products at a time. Two accumulators a
// tap: neighbouring vectors of a row, or neighbouring rows where a row is one vector.
template <class T>
struct DirectGradWeightNchw {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  const Conv2dGradWeight<T>& g;
  const Conv2dPass<T>& p;
  const DirectNchw<T> geometry;
  int64_t width;  // of a row of grad, whole vectors
  bool row_pairs;

  explicit DirectGradWeightNchw(const Conv2dGradWeight<T>& grad) : g(grad), p(grad.p), geometry(grad.p, nullptr) {
    width = (p.OW + L - 1) / L * L;
    row_pairs = width == L;
  }
  int64_t block_size() const { return geometry.block_size(); }
  int64_t grad_size() const { return (geometry.band + 1) * width; }

  void run(int64_t group, C* block, C* rows, C* sums) const {
    const int64_t depth = p.depth();
    std::fill(sums, sums + p.out * depth, C(0));
    for (int64_t image = 0; image < p.N; ++image)
      for (int64_t y0 = 0; y0 < p.OH; y0 += geometry.band) {
        const int64_t y1 = std::min(y0 + geometry.band, p.OH);
        geometry.block.fill(image, group * p.in, p.in, y0, y1, block);
        for (int64_t k = 0; k < p.out; ++k) {
          const T* from = g.grad + image * p.target_strides.image + (group * p.out + k) * p.target_strides.channel;
          for (int64_t y = y0; y < y1; ++y) {
            C* to = rows + (y - y0) * width;
            copy_run(to, from + y * p.target_strides.row, p.OW);
            std::fill(to + p.OW, to + width, C(0));
          }
          for (int64_t d = 0; d < depth;) {
            const int64_t n = depth - d;
            C* to = sums + k * depth + d;
            if (n >= 5 && n != 6) {
              dots<5>(block, rows, y1 - y0, d, to), d += 5;
            } else if (n >= 3) {
              dots<3>(block, rows, y1 - y0, d, to), d += 3;
            } else {
              dots<1>(block, rows, y1 - y0, d, to), d += 1;
            }
          }
        }
      }
    for (int64_t k = 0; k < p.out; ++k)
      for (int64_t c = 0; c < p.in; ++c)
        for (int64_t t = 0; t < p.tap_count; ++t) g.put(group, k, c, t, sums[k * depth + c * p.tap_count + t]);
  }

  template <int TAPS>
  void dots(const C* block, const C* rows, int64_t height, int64_t first, C* sums) const {
    Vec<C> acc[TAPS][2];
    const C* tap[TAPS];
#pragma GCC unroll 5
    for (int t = 0; t < TAPS; ++t) {
      acc[t][0] = acc[t][1] = zero<C>();
      tap[t] = block + geometry.block.offsets[first + t];
    }
    const int64_t down = geometry.block.pitch;
    auto one = [&](const C* grad, int64_t at, int which) {
      const Vec<C> x = load(grad);
#pragma GCC unroll 5
      for (int t = 0; t < TAPS; ++t) acc[t][which] = fma(x, load(tap[t] + at), acc[t][which]);
    };
    if (row_pairs) {
      int64_t y = 0;
      for (; y + 2 <= height; y += 2) {
        one(rows + y * width, y * down, 0);
        one(rows + (y + 1) * width, (y + 1) * down, 1);
      }
      if (y < height) one(rows + y * width, y * down, 0);
    } else {
      for (int64_t y = 0; y < height; ++y) {
        int64_t x = 0;
        for (; x + 2 * L <= width; x += 2 * L) {
          one(rows + y * width + x, y * down + x, 0);
          one(rows + y * width + x + L, y * down + x + L, 1);
        }
        if (x < width) one(rows + y * width + x, y * down + x, 0);
      }
    }
#pragma GCC unroll 5
    for (int t = 0; t < TAPS; ++t) sums[t] += reduce_add<C>(acc[t][0] + acc[t][1]);
  }
};

// Some output channels, NHWC: the spread block of the forward, up to nine (tap, channel) sums at a time. A task has some
// chunks of channels, one after the other under each band: their pixels' cache lines lie beside one another, and an image
// of 5 MiB is read in half to two thirds of the time that chunk after chunk takes.
template <class T>
struct DirectGradWeightNhwc {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  const Conv2dGradWeight<T>& g;
  const Conv2dPass<T>& p;
  DirectNhwc<T> geometry;
  int64_t own;  // channels of a task

  explicit DirectGradWeightNhwc(const Conv2dGradWeight<T>& grad)
      : g(grad), p(grad.p), geometry(grad.p, nullptr, nullptr) {
    geometry.band = geometry.most_rows(131072, p.OH);  // L2; a task walks all bands, so a few large ones
    const int64_t chunks = (geometry.channels + geometry.chunk - 1) / geometry.chunk;
    own = geometry.chunk * std::clamp<int64_t>(chunks / (2 * p.threads), 1, 8);
  }
  int64_t tasks() const { return (geometry.channels + own - 1) / own; }
  int64_t sums_size() const { return p.depth() * own; }

  // sums: [chunks][in * taps][chunk].
  void run(int64_t task, C* spread, DirectTap<C>* taps, C* sums) const {
    const int64_t begin = task * own, end = std::min(begin + own, geometry.channels);
    const int64_t depth = p.depth(), chunk = geometry.chunk;
    std::fill(sums, sums + sums_size(), C(0));
    geometry.list_taps(taps);
    for (int64_t image = 0; image < p.N; ++image)
      for (int64_t y0 = 0; y0 < p.OH; y0 += geometry.band)
        for (int64_t first = begin; first < end; first += chunk) {
          const int64_t y1 = std::min(y0 + geometry.band, p.OH), last = std::min(first + chunk, end);
          geometry.spread_block(image, y0, y1, first, last, spread);
          for (int64_t k = first; k < last; k += L)
            add_all(image, y0, y1, k, last - k, spread + k - first, taps, sums + (first - begin) * depth + k - first);
        }
    for (int64_t k = begin; k < end; ++k) {
      const C* const from = sums + (k - begin) / chunk * chunk * depth + (k - begin) % chunk;
      for (int64_t t = 0; t < p.tap_count; ++t)
        for (int64_t c = 0; c < p.in; ++c) g.put(k / p.out, k % p.out, c, t, from[(t * p.in + c) * chunk]);
    }
  }

  void add_all(int64_t image, int64_t y0, int64_t y1, int64_t k, int64_t cols, const C* spread,
               const DirectTap<C>* taps, C* sums) const {
    for (int64_t d = 0; d < p.depth();) {
      const int64_t left = p.depth() - d;
      C* const to = sums + d * geometry.chunk;
      if (left >= 9) {
        add<9>(image, y0, y1, k, cols, spread, taps + d, to), d += 9;
      } else if (left >= 5) {
        add<5>(image, y0, y1, k, cols, spread, taps + d, to), d += 5;
      } else if (left >= 2) {
        add<2>(image, y0, y1, k, cols, spread, taps + d, to), d += 2;
      } else {
        add<1>(image, y0, y1, k, cols, spread, taps + d, to), d += 1;
      }
    }
  }

  template <int TAPS>
  void add(int64_t image, int64_t y0, int64_t y1, int64_t k, int64_t cols, const C* spread, const DirectTap<C>* taps,
           C* sums) const {
    const ImageStrides& st = p.target_strides;
    const int64_t pixel = p.in * geometry.chunk, row = geometry.spread_width() * pixel;
    constexpr int COPIES = TAPS > 6 ? 1 : 2;  // enough accumulators to hide their latency
    Vec<C> acc[TAPS][COPIES];
#pragma GCC unroll 10
    for (int t = 0; t < TAPS * COPIES; ++t) acc[t / COPIES][t % COPIES] = zero<C>();
    auto one = [&](const T* grad, const C* x, int which) {
      const Vec<C> dy = cols >= L ? load(grad) : load_first(grad, cols);
#pragma GCC unroll 9
      for (int t = 0; t < TAPS; ++t) acc[t][which] = fma(dy, load(x + taps[t].offset), acc[t][which]);
    };
    for (int64_t y = y0; y < y1; ++y) {
      const T* grad = g.grad + image * st.image + y * st.row + k;
      const C* x = spread + (y - y0) * p.step_h * row;
      int64_t i = 0;
      for (; i + 2 <= p.OW; i += 2) {
        one(grad + i * st.column, x + i * p.step_w * pixel, 0);
        one(grad + (i + 1) * st.column, x + (i + 1) * p.step_w * pixel, COPIES - 1);
      }
      if (i < p.OW) one(grad + i * st.column, x + i * p.step_w * pixel, 0);
    }
#pragma GCC unroll 9
    for (int t = 0; t < TAPS; ++t) {
      C* to = sums + t * geometry.chunk;
      store(to, load(to) + (COPIES == 2 ? acc[t][0] + acc[t][1] : acc[t][0]));
    }
  }
};

// ---- choice --------------------------------------------------------------------------------------------------------

template <class T>
void conv2d_grad_weight(const Conv2dGradWeight<T>& g, Conv2dAlgorithm algorithm, bool channels_last) {
  using C = Compute<T>;
  const Conv2dPass<T>& p = g.p;
  if (p.groups * p.out * p.depth() == 0) return;
  const int threads = worth_threads(p.threads, p.flops(), 0);
  auto each_task = [&](int64_t tasks, const auto& make_memory) {
    TaskQueue queue(tasks);
    parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
      make_memory([&](const auto& run) {
        for (int64_t task; queue.take(task);) run(task);
      });
    });
  };
  const bool empty = p.N * p.OH * p.OW == 0;
  if (empty) {
    for (int64_t m = 0; m < p.groups * p.out; ++m)
      for (int64_t c = 0; c < p.in; ++c)
        for (int64_t t = 0; t < p.tap_count; ++t) g.put(m / p.out, m % p.out, c, t, C(0));
  } else if (algorithm == Conv2dAlgorithm::Direct && channels_last) {
    const DirectGradWeightNhwc<T> kernel(g);
    each_task(kernel.tasks(), [&](const auto& loop) {
      Scratch<C> spread(kernel.geometry.spread_size()), sums(kernel.sums_size());
      Scratch<DirectTap<C>> taps(p.depth());
      loop([&](int64_t task) { kernel.run(task, spread, taps, sums); });
    });
  } else if (algorithm == Conv2dAlgorithm::Direct && DepthwiseNchw<T>::serves(p)) {
    const DepthwiseNchw<T> kernel(p, nullptr);
    each_task(kernel.blocks(), [&](const auto& loop) {
      Scratch<C> block(kernel.block_size()), grad(p.OH * p.OW * kLanes<C> + kernel.sums_size());
      std::fill_n(block.data(), kernel.block_size(), C(0));
      loop([&](int64_t task) { kernel.grad_weight(g, task, block, grad); });
    });
  } else if (algorithm == Conv2dAlgorithm::Direct) {
    const DirectGradWeightNchw<T> kernel(g);
    each_task(p.groups, [&](const auto& loop) {
      Scratch<C> block(kernel.block_size()), rows(kernel.grad_size()), sums(p.out * p.depth());
      loop([&](int64_t task) { kernel.run(task, block, rows, sums); });
    });
  } else if (channels_last) {
    const GradWeightNhwc<T> kernel(g);
    for_each_task(kernel.tasks(), threads, [&](int64_t task) { kernel.run(task); });
  } else if (conv2d_grad_gemm_serves(g)) {
    conv2d_grad_gemm(g);
  } else {
    const GradWeightNchw<T> kernel(g);
    for_each_task(kernel.tasks(), threads, [&](int64_t task) { kernel.run(task); });
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA

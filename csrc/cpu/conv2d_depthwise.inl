// Depthwise convolution of small images in NCHW, with vectors along channels.
//
// Rows of 7 or 14 pixels leave vectors along a row half empty, and each costs its fill and its tail. So a vector's worth of
// channels is transposed, pixel by pixel, into a padded block [rows][columns][lanes] that stays in L1 or L2, every output
// is taps FMAs on whole vectors, and eight (lanes) outputs at a time are transposed back on their way out.
//
// The weight's gradient meets the same block with grad_output, transposed too: an accumulator a tap, image after image.
//
// Bound by the loads of the taps, one an FMA; the transposes cost about as much as 3 x 3 taps do.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct DepthwiseNchw {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  const Conv2dPass<T>& p;
  const C* rows;  // weights, [groups][taps]
  TapBox box;
  int64_t top, left, height, width;  // of the padded block: source row and column of its corner, and its size
  // Where in the block, in elements: a source pixel, an output's corner, and a tap from there.
  Scratch<int32_t> input_at, output_at, tap_at;

  DepthwiseNchw(const Conv2dPass<T>& pass, const C* weight_rows)
      : p(pass),
        rows(weight_rows),
        box(pass),
        input_at(pass.H * pass.W),
        output_at(pass.OH * pass.OW),
        tap_at(pass.tap_count) {
    corner(p, box, top, left, height, width);
    for (int64_t q = 0; q < p.H * p.W; ++q) input_at[q] = at(q / p.W, q % p.W);
    for (int64_t q = 0; q < p.OH * p.OW; ++q) output_at[q] = at(q / p.OW * p.step_h + top, q % p.OW * p.step_w + left);
    for (int64_t t = 0; t < p.tap_count; ++t) tap_at[t] = at(p.taps[t].dy, p.taps[t].dx);
  }

  static void corner(const Conv2dPass<T>& p, const TapBox& box, int64_t& top, int64_t& left, int64_t& height,
                     int64_t& width) {
    top = std::min<int64_t>(box.y0, 0), left = std::min<int64_t>(box.x0, 0);
    height = std::max(p.H, (p.OH - 1) * p.step_h + box.y1 + 1) - top;
    width = std::max(p.W, (p.OW - 1) * p.step_w + box.x1 + 1) - left;
  }
  int32_t at(int64_t y, int64_t x) const { return static_cast<int32_t>(((y - top) * width + x - left) * L); }

  // Whether this way is the better one: cycles of a channel here and along rows (conv2d_direct.inl), roughly.
  static bool serves(const Conv2dPass<T>& p) {
    const bool dense = p.source_strides.column == 1 && p.source_strides.row == p.W;
    if (p.in != 1 || p.out != 1 || !dense || p.H * p.W < L) return false;
    const bool in_order = p.target_strides.column == 1 && p.target_strides.row == p.OW;
    if (!in_order && (p.pre_activation || p.activation != Activation::None)) return false;  // see write
    int64_t top, left, height, width;
    corner(p, TapBox(p), top, left, height, width);
    if (height * width * L * int64_t(sizeof(C)) > 131072) return false;
    const double outputs = double(p.OH * p.OW), taps = double(p.tap_count);
    const double here = (p.H * p.W * 5.0 + outputs * (taps * 0.6 + 6)) / L + taps;
    const double along = double(height * p.step_w) * 20 + double(p.OH * ((p.OW + L - 1) / L)) * (taps * 0.6 + 12);
    return here < along;
  }

  int64_t blocks() const { return (p.groups + L - 1) / L; }
  int64_t tasks() const { return p.N * blocks(); }
  int64_t block_size() const { return (height * width + p.tap_count) * L; }

  // `block` is zero where no pixel is written.
  void run(int64_t task, C* block) const {
    const int64_t image = task / blocks(), first = task % blocks() * L;
    int64_t channel[L];  // the last one again where there are fewer: it is computed and written several times
    for (int i = 0; i < L; ++i) channel[i] = std::min(first + i, p.groups - 1);
    C* const weight = block + height * width * L;
    for (int64_t t = 0; t < p.tap_count; ++t)
      for (int i = 0; i < L; ++i) weight[t * L + i] = rows[channel[i] * p.tap_count + t];
    alignas(64) C bias[L] = {};
    for (int i = 0; p.bias && i < L; ++i) bias[i] = load_one(p.bias + channel[i]);
    fill(p.source + image * p.source_strides.image, channel, block);

    const int64_t outputs = p.OH * p.OW;
    for (int64_t q = 0; q < outputs; q += L) {
      const int64_t from = std::max<int64_t>(std::min(q, outputs - L), 0);  // the last vector overlaps the one before
      const C* corner[L];
      for (int i = 0; i < L; ++i) corner[i] = block + output_at[std::min(from + i, outputs - 1)];
      Vec<C> acc[L];
      sums<0>(corner, weight, load(bias), acc);
      if constexpr (L > 8) sums<8>(corner, weight, load(bias), acc);
      transpose_in_place<C>(acc);
      write(acc, image, channel, from, std::min<int64_t>(outputs, L));
    }
  }

  void fill(const T* source, const int64_t (&channel)[L], C* block) const {
    const T* line[L];
    for (int i = 0; i < L; ++i) line[i] = source + channel[i] * p.source_strides.channel;
    const int64_t pixels = p.H * p.W;
    for (int64_t q = 0; q < pixels; q += L) {
      const int64_t from = std::min(q, pixels - L);
      Vec<C> r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = load(line[i] + from);
      transpose_in_place<C>(r);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(block + input_at[from + i], r[i]);
    }
  }

  int64_t sums_size() const { return p.tap_count * L; }

  // The gradient of the weights of channels `task` * L …; `grad` has room for an image's outputs and sums_size().
  void grad_weight(const Conv2dGradWeight<T>& g, int64_t task, C* block, C* grad) const {
    int64_t channel[L];
    for (int i = 0; i < L; ++i) channel[i] = std::min(task * L + i, p.groups - 1);
    const int64_t outputs = p.OH * p.OW;
    C* const sums = grad + outputs * L;
    std::fill_n(sums, sums_size(), C(0));
    for (int64_t image = 0; image < p.N; ++image) {
      fill(p.source + image * p.source_strides.image, channel, block);
      const T* line[L];
      for (int i = 0; i < L; ++i)
        line[i] = g.grad + image * p.target_strides.image + channel[i] * p.target_strides.channel;
      for (int64_t q = 0; q < outputs; q += L) {
        Vec<C> r[L];
        const int64_t from = std::max<int64_t>(std::min(q, outputs - L), 0), count = std::min<int64_t>(outputs, L);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) r[i] = load_first(line[i] + from, count);
        transpose_in_place<C>(r);
        for (int64_t i = 0; i < count; ++i) store(grad + (from + i) * L, r[i]);
      }
      for (int64_t t = 0; t < p.tap_count; t += 8) {
        if (p.tap_count - t >= 8)
          add_taps<8>(t, block, grad, sums);
        else
          for (int64_t i = t; i < p.tap_count; ++i) add_taps<1>(i, block, grad, sums);
      }
    }
    for (int64_t t = 0; t < p.tap_count; ++t)
      for (int64_t i = 0; i < std::min<int64_t>(L, p.groups - task * L); ++i)
        g.put(channel[i], 0, 0, t, sums[t * L + i]);
  }

  // sums[t] += Σ over the outputs of grad · input under tap t, for TAPS taps. One tap alone has four accumulators.
  template <int TAPS>
  FASTNN_INLINE void add_taps(int64_t first, const C* block, const C* grad, C* sums) const {
    constexpr int COPIES = TAPS == 1 ? 4 : 1;
    Vec<C> acc[TAPS * COPIES];
    const C* tap[TAPS];
#pragma GCC unroll 8
    for (int i = 0; i < TAPS * COPIES; ++i) acc[i] = zero<C>();
#pragma GCC unroll 8
    for (int i = 0; i < TAPS; ++i) tap[i] = block + tap_at[first + i];
    const int64_t outputs = p.OH * p.OW;
    int64_t q = 0;
    for (; q + COPIES <= outputs; q += COPIES)
#pragma GCC unroll 4
      for (int copy = 0; copy < COPIES; ++copy) {
        const Vec<C> dy = load(grad + (q + copy) * L);
        const int64_t at = output_at[q + copy];
#pragma GCC unroll 8
        for (int i = 0; i < TAPS; ++i) acc[i * COPIES + copy] = fma(dy, load(tap[i] + at), acc[i * COPIES + copy]);
      }
    for (; q < outputs; ++q)
      for (int i = 0; i < TAPS; ++i)
        acc[i * COPIES] = fma(load(grad + q * L), load(tap[i] + output_at[q]), acc[i * COPIES]);
#pragma GCC unroll 8
    for (int i = 0; i < TAPS; ++i) {
      Vec<C> sum = acc[i * COPIES];
      if constexpr (COPIES == 4) sum = (sum + acc[1]) + (acc[2] + acc[3]);
      store(sums + (first + i) * L, load(sums + (first + i) * L) + sum);
    }
  }

  // Outputs FIRST … of at most eight, one accumulator each: their corners' addresses fit the integer registers.
  template <int FIRST>
  FASTNN_INLINE void sums(const C* const (&corner)[L], const C* weight, Vec<C> start, Vec<C> (&acc)[L]) const {
    constexpr int COUNT = L < 8 ? L : 8;
    Vec<C> sum[COUNT];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) sum[i] = start;
    for (int64_t t = 0; t < p.tap_count; ++t) {
      const Vec<C> w = load(weight + t * L);
      const int64_t offset = tap_at[t];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) sum[i] = fma(w, load(corner[FIRST + i] + offset), sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) acc[FIRST + i] = sum[i];
  }

  // acc[i]: `count` outputs from pixel `from` on of channel[i].
  void write(Vec<C> (&acc)[L], int64_t image, const int64_t (&channel)[L], int64_t from, int64_t count) const {
    const ImageStrides& st = p.target_strides;
    const int64_t base = image * st.image;
    if (st.column == 1 && st.row == p.OW) {
      Vec<C> out[L][1];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) out[i][0] = acc[i];
      return store_rows<T, L, 1>(out, p, count, 1, [&](int i) { return base + channel[i] * st.channel + from; });
    }
    // A phase of a strided gradient: neighbours are not neighbours there.
    alignas(64) C lanes[L][L];
    for (int i = 0; i < L; ++i) store(lanes[i], acc[i]);
    for (int64_t j = 0; j < count; ++j) {
      T* const pixel = p.target + base + (from + j) / p.OW * st.row + (from + j) % p.OW * st.column;
      for (int i = 0; i < L; ++i) store_one(pixel + channel[i] * st.channel, lanes[i][j]);
    }
  }
};

template <class T>
void conv2d_depthwise_nchw(const Conv2dPass<T>& p) {
  using C = Compute<T>;
  const WeightRows<T> rows(p);
  const DepthwiseNchw<T> kernel(p, rows.data);
  TaskQueue queue(kernel.tasks());
  parallel(worth_threads(p.threads, p.flops(), double(p.N * p.groups * (p.H * p.W + p.OH * p.OW) * sizeof(T))),
           [&](int, int) {
             Scratch<C> block(kernel.block_size());
             std::fill_n(block.data(), kernel.block_size(), C(0));
             for (int64_t task; queue.take(task);) kernel.run(task, block);
           });
}

}  // namespace fastnn::cpu::FASTNN_ISA

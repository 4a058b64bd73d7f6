// Gradient of the input for few channels a group where the stride along a row is two, NCHW: both phases of a row at once.
//
// Of the pixels of a row every second is one phase, with taps of its own. A pass for each would store every second
// element, one at a time; here a vector of either is summed in registers, from a padded band of grad_output in L1
// (conv2d_block.inl), and the two are stored as pairs. Mobile networks' 3x3 at stride 2 took 2370 us in four passes.
// Bound by the loads of the taps and by the stores.
#pragma once

#include "cpu/conv2d_block.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct PairedRows {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kRows = 4;
  const Conv2dPass<T>& p;  // its grid is one of pairs: OW of them, two elements of the target each
  const C* rows;           // weights, [groups * out][in * taps]
  int64_t even_taps;       // the first taps are those of the first pixel of a pair, the others those of the second
  int64_t width;           // of a row of the target, elements
  int64_t band = 1, bands;
  PhaseBlock<T> block;

  PairedRows(const Conv2dPass<T>& pass, const C* weight_rows, int64_t even, int64_t row_width)
      : p(pass),
        rows(weight_rows),
        even_taps(even),
        width(row_width),
        block(pass, (pass.OW + L - 1) / L * L, false, pass.in) {
    while (band < p.OH && (band < 2 * kRows || block.bytes(p.in, band + 1) <= 32768)) ++band;  // L1
    bands = (p.OH + band - 1) / band;
    band = (p.OH + bands - 1) / bands;
    block.set_band(p.in, band);
  }
  int64_t tasks() const { return p.N * p.groups * bands; }
  int64_t block_size() const { return block.size(p.in); }

  void run(int64_t task, C* memory) const {
    const int64_t image = task / (p.groups * bands), group = task / bands % p.groups;
    const int64_t y0 = task % bands * band, y1 = std::min(y0 + band, p.OH);
    if (y0 >= y1) return;
    block.fill(image, group * p.in, p.in, y0, y1, memory);
    for (int64_t k = group * p.out; k < (group + 1) * p.out; ++k)
      for (int64_t x = 0; x < p.OW; x += L) {
        T* to = p.target + image * p.target_strides.image + k * p.target_strides.channel + 2 * x;
        int64_t y = y0;
        for (; y + kRows <= y1; y += kRows) tile<kRows>(memory, y, y0, x, k, to);
        for (; y < y1; ++y) tile<1>(memory, y, y0, x, k, to);
      }
  }

 private:
  // A vector of pairs, in each of ROWS rows from y on.
  template <int ROWS>
  void tile(const C* memory, int64_t y, int64_t y0, int64_t x, int64_t k, T* to) const {
    Vec<C> even[ROWS], odd[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) even[i] = odd[i] = zero<C>();
    const C *from = memory + (y - y0) * block.pitch + x, *weight = rows + k * p.depth();
    for (int64_t c = 0; c < p.in; ++c, weight += p.tap_count) {
      const int64_t* const offsets = block.offsets + c * p.tap_count;
      add<ROWS>(from, weight, offsets, even_taps, even);
      add<ROWS>(from, weight + even_taps, offsets + even_taps, p.tap_count - even_taps, odd);
    }
    const int64_t left = width - 2 * x;
    for (int i = 0; i < ROWS; ++i) {
      T* const row = to + (y + i) * p.target_strides.row;
      const Vec<C> low = pairs<C, false>(even[i], odd[i]), high = pairs<C, true>(even[i], odd[i]);
      if (left >= 2 * L) {
        store(row, low);
        store(row + L, high);
      } else {
        store_first(row, low, left);
        if (left > L) store_first(row + L, high, left - L);
      }
    }
  }
  template <int ROWS>
  FASTNN_INLINE void add(const C* from, const C* weight, const int64_t* offsets, int64_t taps, Vec<C>* acc) const {
    for (int64_t t = 0; t < taps; ++t) {
      const Vec<C> w = splat<C>(weight[t]);
      const C* tap = from + offsets[t];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) acc[i] = fma(w, load(tap + i * block.pitch), acc[i]);
    }
  }
};

template <class T>
void conv2d_grad_pairs(const Conv2dPass<T>& p, int64_t even_taps, int64_t width) {
  const WeightRows<T> rows(p);
  const PairedRows<T> kernel(p, rows.data, even_taps, width);
  TaskQueue queue(kernel.tasks());
  parallel(worth_threads(p.threads, p.flops(), 0), [&](int, int) {
    Scratch<Compute<T>> memory(kernel.block_size());
    for (int64_t task; queue.take(task);) kernel.run(task, memory);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

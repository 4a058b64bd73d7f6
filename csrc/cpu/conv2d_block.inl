// A band of input rows, zero-padded and split by the phases of the stride: where the kernels for NCHW read each pixel
// under several taps from, at unit stride and without a border.
//
// [channels][phases][rows][pitch]: phase (py, px) holds the rows y0 + py + i * step_h and the columns x0 + px + j * step_w
// of the image, (y0, x0) being the corner of the first output's taps. A tap then lies at one distance from every output
// of the band, `offsets`. Rows may share their padding: a right border of zeros is the next row's left border.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
struct PhaseBlock {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>;
  struct Phase {
    int64_t y, x;       // image row and column of its first element, for output row 0
    int64_t low, high;  // its columns inside the image
  };
  const Conv2dPass<T>& p;
  TapBox box;
  int64_t width, pitch, reach;  // columns of a row, from one row to the next, rows that taps reach further down
  int64_t phase_count = 0;
  int64_t phase_size = 0, plane = 0;  // elements, for the band in use
  Scratch<Phase> phases;              // those that a tap meets
  Scratch<int64_t> offsets;           // of each (channel, tap)
  int64_t at_once;                    // phases of one row that are filled together

  // `columns` outputs of a row are read, and at least as many are zeros or pixels; `share`: rows share their padding.
  PhaseBlock(const Conv2dPass<T>& pass, int64_t columns, bool share, int64_t channels)
      : p(pass), box(pass), phases(std::min(p.step_h * p.step_w, p.tap_count)), offsets(channels * p.tap_count) {
    width = columns + (box.x1 - box.x0) / p.step_w;
    reach = (box.y1 - box.y0) / p.step_h;
    int64_t border = width;
    for (int64_t py = 0; py < std::min(p.step_h, box.y1 - box.y0 + 1); ++py)
      for (int64_t px = 0; px < std::min(p.step_w, box.x1 - box.x0 + 1); ++px) {
        if (!met(py, px)) continue;
        Phase phase{box.y0 + py, box.x0 + px, 0, 0};
        phase.low = std::clamp<int64_t>((-phase.x + p.step_w - 1) / p.step_w, 0, width);
        phase.high = std::clamp<int64_t>((p.W - phase.x + p.step_w - 1) / p.step_w, phase.low, width);
        border = std::min({border, phase.low, width - phase.high});
        phases[phase_count++] = phase;
      }
    at_once = p.step_w == 2 || p.step_w == 4 ? p.step_w : 1;
    if (phase_count % at_once) at_once = 1;
    for (int64_t i = 0; at_once > 1 && i < phase_count; i += at_once)
      if (RowPhases row; !row_phases(i, row)) at_once = 1;
    pitch = width - (share ? std::min(border, width - columns) : 0);  // no row is shorter than its outputs
  }

  int64_t bytes(int64_t channels, int64_t rows) const {
    return channels * phase_count * (rows + reach) * pitch * int64_t(sizeof(C));
  }
  void set_band(int64_t channels, int64_t rows) {
    constexpr int64_t kLine = 64 / sizeof(C);
    phase_size = (rows + reach) * pitch + L;                               // a phase is filled while the next is
    plane = ((phase_count * phase_size + kLine - 1) / kLine | 1) * kLine;  // odd: channels fall on different cache sets
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < p.tap_count; ++t) offsets[c * p.tap_count + t] = c * plane + offset(p.taps[t]);
  }
  // Loads of outputs up to a tile further than the last one stay inside.
  int64_t size(int64_t channels) const { return channels * plane + kNR<C> + L; }

  // Channels `first` … of an image, under output rows y0 … y1. In ascending order: each row writes up to a vector too much.
  void fill(int64_t image, int64_t first, int64_t channels, int64_t y0, int64_t y1, C* block) const {
    const T* source = p.source + image * p.source_strides.image + first * p.source_strides.channel;
    for (int64_t c = 0; c < channels; ++c, source += p.source_strides.channel)
      for (int64_t i = 0; i < phase_count; i += at_once) {
        C* to = block + c * plane + i * phase_size;
        RowPhases all{};
        if (at_once > 1) row_phases(i, all);
        int64_t y = y0 * p.step_h + phases[i].y;
        for (int64_t row = 0; row < y1 - y0 + reach; ++row, y += p.step_h, to += pitch) {
          const T* from = source + y * p.source_strides.row;
          const bool inside = y >= 0 && y < p.H;
          if (inside && at_once == 2 && from + all.end <= p.source_end) {
            fill_phases<2>(from + all.x, all, to);
          } else if (inside && at_once == 4 && from + all.end <= p.source_end) {
            fill_phases<4>(from + all.x, all, to);
          } else {
            for (int64_t j = 0; j < at_once; ++j) fill_row(inside ? from : nullptr, phases[i + j], to + j * phase_size);
          }
        }
      }
  }

 private:
  bool met(int64_t py, int64_t px) const {
    for (int64_t t = 0; t < p.tap_count; ++t)
      if ((p.taps[t].dy - box.y0) % p.step_h == py && (p.taps[t].dx - box.x0) % p.step_w == px) return true;
    return false;
  }
  int64_t offset(const Tap& tap) const {
    const int64_t dy = tap.dy - box.y0, dx = tap.dx - box.x0;
    for (int64_t i = 0; i < phase_count; ++i)
      if (phases[i].y - box.y0 == dy % p.step_h && phases[i].x - box.x0 == dx % p.step_w)
        return i * phase_size + dy / p.step_h * pitch + dx / p.step_w;
    return 0;
  }
  // All phases of a row whose pixels follow one another in turn, in that order.
  struct RowPhases {
    int64_t x, end, count;           // image column of the first pixel, one past the last one read, pixels of a phase
    int64_t low[4], high[4], at[4];  // columns of each phase inside the image, and where it lies
  };
  // False if the pixels of phases i … do not follow in turn.
  bool row_phases(int64_t i, RowPhases& row) const {
    row.x = std::numeric_limits<int64_t>::max(), row.count = 0;
    for (int64_t j = i; j < i + at_once; ++j) {
      row.x = std::min(row.x, phases[j].x + p.step_w * phases[j].low);
      row.count = std::max(row.count, (phases[j].high - phases[j].low + L - 1) / L * L);
    }
    row.end = row.x + p.step_w * row.count;
    int64_t found = 0;
    for (int64_t j = i; j < i + at_once; ++j) {
      const int64_t turn = phases[j].x + p.step_w * phases[j].low - row.x;
      if (phases[j].y != phases[i].y || turn >= at_once) return false;
      row.low[turn] = phases[j].low, row.high[turn] = phases[j].high, row.at[turn] = (j - i) * phase_size;
      found |= int64_t(1) << turn;
    }
    return found == (int64_t(1) << at_once) - 1;
  }
  template <int STEP>
  void fill_phases(const T* from, const RowPhases& row, C* to) const {
    for (int i = 0; i < STEP; ++i) zero_over(to + row.at[i], row.low[i]);
    for (int64_t j = 0; j < row.count; j += L, from += STEP * L) {
      Vec<C> a = load(from), b = load(from + L);
      auto put = [&](int i, Vec<C> v) { store(to + row.at[i] + row.low[i] + j, v); };
      if constexpr (STEP == 2) {
        put(0, every_second<C>(a, b));
        put(1, every_second<C, 1>(a, b));
      } else {
        const Vec<C> c = load(from + 2 * L), d = load(from + 3 * L);
        const Vec<C> even = every_second<C>(a, b), even2 = every_second<C>(c, d);
        const Vec<C> odd = every_second<C, 1>(a, b), odd2 = every_second<C, 1>(c, d);
        put(0, every_second<C>(even, even2));
        put(1, every_second<C>(odd, odd2));
        put(2, every_second<C, 1>(even, even2));
        put(3, every_second<C, 1>(odd, odd2));
      }
    }
    for (int i = 0; i < STEP; ++i) zero_over(to + row.at[i] + row.high[i], width - row.high[i]);
  }
  // One phase of a row; source is null for a row of padding.
  void fill_row(const T* source, const Phase& phase, C* to) const {
    if (!source) return zero_over(to, width);
    const int64_t low = phase.low, high = phase.high;
    const T* from = source + phase.x;
    zero_over(to, low);
    if (p.step_w == 1) {
      copy_over(to + low, from + low, high - low, p.source_end);
    } else if (p.step_w == 2 && from + 2 * (high + L) <= p.source_end) {
      for (int64_t j = low; j < high; j += L) store(to + j, load_even(from + 2 * j));
    } else {
      for (int64_t j = low; j < high; ++j) to[j] = load_one(from + j * p.step_w);
    }
    zero_over(to + high, width - high);
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA

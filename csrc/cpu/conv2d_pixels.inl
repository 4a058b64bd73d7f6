// Where a tile of pixels lies in an NCHW image, and how its sums get there.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Columns `column` … of a tile that are neighbours in one row of the grid.
struct PixelRun {
  int64_t image, y, x;
  int32_t column, count;
};

// Where the columns of a tile lie, for all output channels alike.
template <class C>
struct PixelTile {
  PixelRun runs[kNR<C>];
  int count = 0;
  int64_t cols = 0;       // in use, of kNR
  bool together = false;  // they are neighbours in memory, without gaps
  // Rows of the image before this one are written later in the same task: what is written there now does no harm.
  int64_t end = 0;

  template <class T>
  void find_together(const Conv2dPass<T>& p) {
    const PixelRun &front = runs[0], &back = runs[count - 1];
    const bool full = front.column == 0 && back.column + back.count == cols && p.target_strides.column == 1;
    const bool one_line = p.target_strides.row == p.OW && back.image == front.image &&
                          (back.y - front.y) * p.OW + back.x - front.x == back.column;
    together = full && (count == 1 || one_line);
  }
};

template <class T>
void store_runs(const Conv2dPass<T>& p, T* base, const Compute<T>* sums, int rows, int64_t channel,
                const PixelTile<Compute<T>>& tile) {
  constexpr int L = kLanes<Compute<T>>, NR = kNR<Compute<T>>;
  const ImageStrides& st = p.target_strides;
  for (int r = 0; r < tile.count; ++r) {
    const PixelRun& run = tile.runs[r];
    T* to = base + run.image * st.image + channel * st.channel + run.y * st.row + run.x * st.column;
    const Compute<T>* from = sums + run.column;
    const int64_t vectors = (run.count + L - 1) / L;
    const bool over = st.column == 1 && st.row == p.OW && run.y * p.OW + run.x + vectors * L <= tile.end * p.OW;
    for (int i = 0; i < rows; ++i, to += st.channel, from += NR) {
      if (over) {
        for (int64_t x = 0; x < vectors * L; x += L) store(to + x, load(from + x));
      } else if (st.column == 1) {
        copy_run(to, from, run.count);
      } else {
        for (int x = 0; x < run.count; ++x) store_one(to + x * st.column, from[x]);
      }
    }
  }
}
template <class T>
__attribute__((noinline)) void store_scattered(const Conv2dPass<T>& p, Compute<T>* sums, int rows, int64_t channel,
                                               const PixelTile<Compute<T>>& tile) {
  using C = Compute<T>;
  if (p.pre_activation) store_runs(p, p.pre_activation, sums, rows, channel, tile);
  if (p.activation != Activation::None) activate_in_place<C>(p.activation, sums, rows * kNR<C>);
  store_runs(p, p.target, sums, rows, channel, tile);
}

// Writes the finished sums of a tile, of ROWS output channels from `channel` on, through the activation.
template <class T, int ROWS, int VECTORS>
FASTNN_INLINE void store_pixels(Vec<Compute<T>> (&acc)[ROWS][VECTORS], const Conv2dPass<T>& p, int64_t channel,
                                const PixelTile<Compute<T>>& tile) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>, NR = kNR<C>;
  if (tile.together) {
    const ImageStrides& st = p.target_strides;
    const PixelRun& run = tile.runs[0];
    const int64_t at = run.image * st.image + channel * st.channel + run.y * st.row + run.x;
    return store_rows<T, ROWS, VECTORS>(acc, p, tile.cols, 1, [&](int i) { return at + i * st.channel; });
  }
  alignas(64) C sums[ROWS * NR + L];  // a run's last vector may read past its row
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    store(sums + i * NR, acc[i][0]);
    store(sums + i * NR + L, VECTORS == 2 ? acc[i][VECTORS - 1] : zero<C>());
  }
  store(sums + ROWS * NR, zero<C>());
  store_scattered(p, sums, ROWS, channel, tile);
}

}  // namespace fastnn::cpu::FASTNN_ISA

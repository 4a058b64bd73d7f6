// Convolution in NHWC as an implicit GEMM: [pixels, taps * in] x [taps * in, out] for each group.
//
// Vectors run along output channels. The six rows of a tile are six pixels, each given under each tap by a pointer to
// its channels (an indirect convolution, as in XNNPACK: arXiv 1907.02129): float and double inputs are read where they
// lie, padding is a row of zeros. 16-bit inputs, and inputs of few channels (a stem), are first gathered into rows of
// compute type, taps * in long, for some tiles of pixels at a time. Weights are packed [panel][tap][in][NR].
//
// No K blocks: a panel of weights (taps * in * 64 bytes) streams from L2 at 11 bytes a cycle. FMA-bound.
#pragma once

#include "cpu/conv2d_band_nhwc.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class T>
int64_t packed_size_nhwc(const Conv2dPass<T>& p) {
  constexpr int NR = kNR<Compute<T>>;
  return p.groups * ((p.out + NR - 1) / NR) * p.depth() * NR;
}

// One panel: channels m … m + cols of a group, [taps][in][NR].
template <class T>
void pack_panel_nhwc(const Conv2dPass<T>& p, const T* weight, int64_t cols, Compute<T>* to) {
  using C = Compute<T>;
  constexpr int NR = kNR<C>;
  if (!p.weight_in_order() || p.tap_count == 1) {
    for (int64_t t = 0; t < p.tap_count; ++t)
      pack_panel<NR>(weight + p.taps[t].weight, p.weight_out, p.weight_in, cols, p.in, to + t * p.in * NR);
    return;
  }
  // Rows lie as (c, tap): transposed in pieces, then each line goes to its place in (tap, c).
  constexpr int64_t kPiece = 64;
  alignas(64) C lines[kPiece * NR];
  int64_t c = 0, t = 0;
  for (int64_t k = 0; k < p.depth(); k += kPiece) {
    const int64_t n = std::min(kPiece, p.depth() - k);
    pack_panel<NR>(weight + k, p.weight_out, 1, cols, n, lines);
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(to + (t * p.in + c) * NR, lines + i * NR, sizeof(C) * NR);
      if (++t == p.tap_count) t = 0, ++c;
    }
  }
}

template <class T>
void pack_nhwc(const Conv2dPass<T>& p, Compute<T>* to) {
  constexpr int NR = kNR<Compute<T>>;
  const int64_t panels = (p.out + NR - 1) / NR;
  for_each_task(p.groups * panels, worth_threads(p.threads, 0, double(p.groups * p.out * p.depth() * sizeof(T))),
                [&](int64_t task) {
                  const int64_t group = task / panels, m = task % panels * NR;
                  pack_panel_nhwc(p, p.weight + group * p.weight_group + m * p.weight_out,
                                  std::min<int64_t>(NR, p.out - m), to + task * p.depth() * NR);
                });
}

// Taps of one row of the kernel that are neighbours in memory, too (`taps` many; 1 where the layout does not have it so).
struct TapRun {
  int64_t dy, dx, taps;
};

template <class T>
struct ImplicitNhwc {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, NR = kNR<C>;
  const Conv2dPass<T>& p;
  const C* packed;
  const C* zeros;  // a pixel of padding
  const C* bias;   // [groups][panels * NR]
  int64_t pixels, tiles, per_block, blocks, panels, splits;
  bool gathered;  // rows are copied, one segment of taps * in
  Scratch<TapRun> runs;
  int64_t run_count = 0;

  ImplicitNhwc(const Conv2dPass<T>& pass, const C* weights, const C* zero_pixel, const C* padded_bias)
      : p(pass), packed(weights), zeros(zero_pixel), bias(padded_bias), runs(pass.tap_count) {
    pixels = p.N * p.OH * p.OW;
    panels = (p.out + NR - 1) / NR;
    gathered = !std::is_same_v<T, C> || (p.in < 16 && p.tap_count > 1);
    for (int64_t t = 0; t < p.tap_count; ++t) {
      TapRun* last = run_count ? runs + run_count - 1 : nullptr;
      if (last && p.source_strides.column == p.in && p.taps[t].dy == last->dy && p.taps[t].dx == last->dx + last->taps)
        ++last->taps;
      else
        runs[run_count++] = {p.taps[t].dy, p.taps[t].dx, 1};
    }
    tiles = (pixels + kTileRows - 1) / kTileRows;
    const int64_t tile_bytes = std::max<int64_t>(
        kTileRows * (gathered ? p.depth() * int64_t(sizeof(C)) : p.tap_count * int64_t(sizeof(void*))), 1);
    per_block = std::clamp<int64_t>(131072 / tile_bytes, 1, 16);
    blocks = (tiles + per_block - 1) / per_block;
    per_block = (tiles + blocks - 1) / blocks;
    splits = 1;
    if (p.threads > 1 && blocks * p.groups < 2 * p.threads)
      splits = std::clamp<int64_t>((2 * p.threads + blocks * p.groups - 1) / (blocks * p.groups), 1, panels);
  }

  int64_t tasks() const { return p.groups * blocks * splits; }

  void run(int64_t task) const {
    const int64_t group = task / (blocks * splits), block = task / splits % blocks, split = task % splits;
    // The block's pixels, in tiles of even height.
    const int64_t q0 = std::min(block * per_block * kTileRows, pixels);
    const int64_t q1 = std::min(q0 + per_block * kTileRows, pixels);
    if (q0 >= q1) return;
    const EvenRows even(q1 - q0);
    const int64_t segments = gathered ? 1 : p.tap_count, depth = gathered ? p.depth() : p.in;
    Scratch<const C*> pointers(even.tiles * segments * kTileRows);
    Scratch<int64_t> places(q1 - q0);
    Scratch<C> rows(gathered ? (q1 - q0) * p.depth() + L : 0);
    int64_t image = q0 / (p.OH * p.OW), y = q0 / p.OW % p.OH, x = q0 % p.OW;
    for (int64_t tile = 0; tile < even.tiles; ++tile)
      for (int64_t q = even.begin(tile); q < even.begin(tile + 1); ++q) {
        places[q] = image * p.target_strides.image + y * p.target_strides.row + x * p.target_strides.column;
        const T* source = p.source + image * p.source_strides.image + group * p.in;
        const C** to = pointers + tile * segments * kTileRows + (q - even.begin(tile));
        if (gathered) {
          gather_row(source, y * p.step_h, x * p.step_w, rows + q * p.depth());
          *to = rows + q * p.depth();
        } else if constexpr (std::is_same_v<T, C>) {
          for (int64_t t = 0; t < p.tap_count; ++t, to += kTileRows) {
            const int64_t iy = y * p.step_h + p.taps[t].dy, ix = x * p.step_w + p.taps[t].dx;
            const bool inside = iy >= 0 && iy < p.H && ix >= 0 && ix < p.W;
            *to = inside ? source + iy * p.source_strides.row + ix * p.source_strides.column : zeros;
          }
        }
        if (++x == p.OW) {
          x = 0;
          if (++y == p.OH) y = 0, ++image;
        }
      }
    const int64_t panel_end = panels * (split + 1) / splits;
    for (int64_t panel = panels * split / splits; panel < panel_end; ++panel) {
      const int64_t cols = std::min<int64_t>(NR, p.out - panel * NR), channel = group * p.out + panel * NR;
      const C* b = packed + (group * panels + panel) * p.depth() * NR;
      const C* start = bias + (group * panels + panel) * NR;
      for (int64_t tile = 0; tile < even.tiles; ++tile) {
        const int64_t q = even.begin(tile);
        const C* const* a = pointers + tile * segments * kTileRows;
        with_exact_rows(even.begin(tile + 1) - q, [&](auto h) {
          constexpr int ROWS = decltype(h)::value;
          if (cols <= L)
            multiply<ROWS, 1>(segments, a, depth, b, start, places + q, channel, cols);
          else
            multiply<ROWS, 2>(segments, a, depth, b, start, places + q, channel, cols);
        });
      }
    }
  }

  // All taps of one pixel's patch, [taps][in].
  void gather_row(const T* source, int64_t y, int64_t x, C* to) const {
    const ImageStrides& st = p.source_strides;
    for (const TapRun* run = runs; run != runs + run_count; ++run) {
      const int64_t iy = y + run->dy, ix = x + run->dx, n = run->taps;
      int64_t low = std::clamp<int64_t>(-ix, 0, n), high = std::clamp<int64_t>(p.W - ix, 0, n);
      if (iy < 0 || iy >= p.H || high <= low) low = high = n;
      zero_over(to, low * p.in);
      if (high > low)
        copy_over(to + low * p.in, source + iy * st.row + (ix + low) * st.column, (high - low) * p.in, p.source_end);
      zero_over(to + high * p.in, (n - high) * p.in);
      to += n * p.in;
    }
  }

  template <int ROWS, int VECTORS>
  void multiply(int64_t segments, const C* const* a, int64_t depth, const C* b, const C* start, const int64_t* places,
                int64_t channel, int64_t cols) const {
    Vec<C> acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = load(start + j * L);
    tile_kernel<C, ROWS, VECTORS>(segments, a, depth, b, acc);
    store_rows<T, ROWS, VECTORS>(acc, p, cols, 1, [&](int i) { return places[i] + channel; });
  }
};

template <class T>
void conv2d_implicit_nhwc(const Conv2dPass<T>& p) {
  using C = Compute<T>;
  constexpr int NR = kNR<C>;
  const int threads = worth_threads(p.threads, p.flops(), 0);
  Scratch<C> memory(p.packed ? 0 : packed_size_nhwc(p));
  if (!p.packed) pack_nhwc(p, memory.data());
  const C* packed = p.packed ? p.packed : memory.data();
  const int64_t padded = (p.out + NR - 1) / NR * NR;
  Scratch<C> zeros(p.in), bias(p.groups * padded);
  std::fill(zeros.data(), zeros.data() + p.in, C(0));
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t m = 0; m < padded; ++m)
      bias[g * padded + m] = p.bias && m < p.out ? load_one(p.bias + g * p.out + m) : C(0);
  if (BandNhwc<T>::serves(p)) return conv2d_band_nhwc(p, packed, bias.data());
  const ImplicitNhwc<T> kernel(p, packed, zeros, bias);
  for_each_task(kernel.tasks(), threads, [&](int64_t task) { kernel.run(task); });
}

}  // namespace fastnn::cpu::FASTNN_ISA

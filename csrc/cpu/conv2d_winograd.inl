// Convolution 3 x 3 of stride 1 by Winograd's F(2 x 2, 3 x 3) or F(4 x 4, 3 x 3), see conv2d_winograd_transform.inl.
//
// With a dilation d every d-th pixel is an image of its own: tile t of a row begins at pixel t / d * M d + t % d and goes on
// in steps of d, so that d neighbouring tiles cover M d neighbouring pixels. Blocks are whole such groups of tiles.
#pragma once

#include "cpu/conv2d_winograd_transform.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Sizes that depend on the channels alone, and so on the packed filter.
template <class T>
struct WinogradChannels {
  using C = Compute<T>;
  static constexpr int NR = kNR<C>;
  int64_t in, panels, per_group, KC, blocks;  // panels of NR output channels; panels that are done together
  explicit WinogradChannels(const Conv2dPass<T>& p) : in(p.in) {
    panels = (p.out + NR - 1) / NR;
    per_group = 2;
    const int64_t most = 64;
    blocks = std::max<int64_t>((in + most - 1) / most, 1);
    KC = ((in + blocks - 1) / blocks + NR - 1) / NR * NR;
    blocks = std::max<int64_t>((in + KC - 1) / KC, 1);
  }
  int64_t panel_groups() const { return (panels + per_group - 1) / per_group; }
};

template <int M, class T>
int64_t packed_size_winograd(const Conv2dPass<T>& p) {
  constexpr int64_t NR = kNR<Compute<T>>, kPoints = (M + 2) * (M + 2);
  return p.groups * ((p.out + NR - 1) / NR) * NR * p.in * kPoints;
}

// The filter of one panel and n channels from c on, n at most kChannels, of a group, to [point][channel][NR] with points
// `stride` apart.
template <class C>
inline constexpr int64_t kWinogradChannels = 128 / kNR<C>;  // so many channels' points are 18 KiB
template <int M, class T>
void winograd_pack_some(const Conv2dPass<T>& p, const WinogradGrid& grid, int64_t group, int64_t panel, int64_t c,
                        int64_t n, Compute<T>* to, int64_t stride) {
  using C = Compute<T>;
  constexpr int P = M + 2, NR = kNR<C>, L = kLanes<C>, kMost = kWinogradChannels<C>;
  alignas(64) C lines[kMost * 9 * NR], points[P * P * kMost * NR];
  const int64_t m = panel * NR, cols = std::min<int64_t>(NR, p.out - m);
  const T* weight = p.weight + group * p.weight_group + m * p.weight_out + c * p.weight_in;
  if (grid.dense && p.weight_in == 9)
    pack_panel<NR>(weight, p.weight_out, 1, cols, n * 9, lines);
  else if (grid.dense)
    for (int64_t i = 0; i < n; ++i)
      pack_panel<NR>(weight + i * p.weight_in, p.weight_out, 1, cols, 9, lines + i * 9 * NR);
  else
    for (int64_t t = 0; t < 9; ++t)
      pack_panel<NR>(weight + grid.weight[t], p.weight_out, p.weight_in, cols, n, lines + t * kMost * NR);
  for (int64_t i = 0; i < n; ++i) {
    const C* line[9];
    for (int t = 0; t < 9; ++t) line[t] = lines + (grid.dense ? i * 9 + grid.weight[t] : t * kMost + i) * NR;
    for (int v = 0; v < NR; v += L) winograd_filter_patch<M, C>(line, v, points + i * NR + v, kMost * NR);
  }
  // Through a block in L1: written where they belong at once, 36 lines that lie a power of two apart evict each other.
  for (int64_t point = 0; point < P * P; ++point)
    std::memcpy(to + point * stride, points + point * kMost * NR, sizeof(C) * n * NR);
}

// Panels [first, last) of a group, whole groups of panels, as the kernel reads them:
// [group of panels][point][block of channels][panel][channel][NR].
template <int M, class T>
void winograd_pack_panels(const Conv2dPass<T>& p, const WinogradGrid& grid, int64_t group, int64_t first, int64_t last,
                          Compute<T>* to) {
  constexpr int NR = kNR<Compute<T>>, kPoints = (M + 2) * (M + 2);
  const WinogradChannels<T> s(p);
  for_each_task(
      (last - first) * s.blocks, worth_threads(p.threads, 0, double((last - first) * NR * p.in * kPoints)),
      [&](int64_t task) {
        const int64_t panel = first + task / s.blocks, block = task % s.blocks;
        const int64_t start = panel / s.per_group * s.per_group, many = std::min(s.per_group, s.panels - start);
        const int64_t c0 = block * s.KC, width = std::min(s.KC, s.in - c0);
        auto* base = to + (start - first) * NR * s.in * kPoints + (c0 * many + (panel - start) * width) * NR;
        for (int64_t c = 0; c < width; c += kWinogradChannels<Compute<T>>)
          winograd_pack_some<M>(p, grid, group, panel, c0 + c, std::min(kWinogradChannels<Compute<T>>, width - c),
                                base + c * NR, s.in * many * NR);
      });
}

template <int M, class T>
void pack_winograd(const Conv2dPass<T>& p, Compute<T>* to) {
  const WinogradGrid grid(p);
  const WinogradChannels<T> s(p);
  for (int64_t g = 0; g < p.groups; ++g)
    winograd_pack_panels<M>(p, grid, g, 0, s.panels, to + g * packed_size_winograd<M>(p) / p.groups);
}

template <class T, int M>
struct Winograd {
  using C = Compute<T>;
  static constexpr int P = M + 2, kPoints = P * P, L = kLanes<C>, NR = kNR<C>;
  const Conv2dPass<T>& p;
  const WinogradGrid& grid;
  bool channels_last;
  int64_t sy, sx;  // dilation
  WinogradChannels<T> s;
  int64_t tiles_y, tiles_x, tiles, per_block, blocks;
  int64_t v_point, m_point;  // distance of two points in V and in the products
  C low, high;               // of an activation that clamps

  // Tiles [begin, end) of one row of tiles; `first` is the number of the first in the block.
  struct Piece {
    int64_t image, row, begin, end, first;
  };

  Winograd(const Conv2dPass<T>& pass, const WinogradGrid& taps, bool nhwc)
      : p(pass), grid(taps), channels_last(nhwc), sy(taps.step_y), sx(taps.step_x), s(pass) {
    tiles_y = (p.OH + M * sy - 1) / (M * sy) * sy, tiles_x = (p.OW + M * sx - 1) / (M * sx) * sx;
    tiles = p.N * tiles_y * tiles_x;
    const int64_t most = std::max<int64_t>(32, sx);
    blocks = (tiles + most - 1) / most;
    if (blocks >= p.threads) blocks = (blocks + p.threads - 1) / p.threads * p.threads;
    per_block = ((tiles + blocks - 1) / blocks + sx - 1) / sx * sx;
    blocks = (tiles + per_block - 1) / per_block;
    v_point = per_block * s.KC * s.blocks + 16;
    m_point = per_block * NR + 16;
    high = std::numeric_limits<C>::infinity();
    low = p.clamps() && p.activation != Activation::None ? C(0) : -high;
    if (p.clamps() && p.activation == Activation::Relu6) high = 6;
  }

  int64_t v_size() const { return kPoints * v_point; }
  int64_t m_size() const { return s.per_group * kPoints * m_point; }
  int64_t stage_size() const { return channels_last ? 0 : per_block * M * M * NR; }
  int64_t strip_size() const { return channels_last ? 0 : P * (std::min(per_block, tiles_x) * M + 2 * sx) * NR; }
  int64_t count(int64_t block) const { return std::min(per_block, tiles - block * per_block); }

  // Where a tile begins, and how many of its M outputs lie inside `size`.
  static int64_t origin(int64_t tile, int64_t step) { return tile / step * M * step + tile % step; }
  static int64_t inside(int64_t first, int64_t step, int64_t size) {
    return std::clamp<int64_t>((size - first + step - 1) / step, 0, M);
  }

  template <class F>
  void for_each_piece(int64_t block, const F& f) const {
    int64_t tile = block * per_block;
    const int64_t n = count(block);
    for (int64_t done = 0; done < n;) {
      const int64_t begin = tile % tiles_x, width = std::min(tiles_x - begin, n - done), row = tile / tiles_x;
      f(Piece{row / tiles_y, row % tiles_y, begin, begin + width, done});
      done += width, tile += width;
    }
  }

  // ---- B^T d B -------------------------------------------------------------------------------------------------------

  C* v_of(C* v, int64_t tile, int64_t c) const { return v + c / s.KC * per_block * s.KC + tile * s.KC + c % s.KC; }

  // Channels [c0, c1) of a block's tiles, c0 a multiple of NR.
  void transform_input(int64_t group, int64_t block, int64_t c0, int64_t c1, C* v, C* strip, const T* zeros) const {
    for_each_piece(block, [&](const Piece& piece) {
      if (channels_last)
        transform_nhwc(piece, group, c0, c1, v, zeros);
      else
        for (int64_t c = c0; c < c1; c += NR) transform_nchw(piece, group, c, std::min<int64_t>(NR, c1 - c), v, strip);
    });
  }

  void transform_nhwc(const Piece& piece, int64_t group, int64_t c0, int64_t c1, C* v, const T* zeros) const {
    const ImageStrides st = p.source_strides;
    const int64_t row = sy * st.row, column = sx * st.column;
    const T* image = p.source + piece.image * st.image + group * p.in;
    const int64_t y = origin(piece.row, sy) + grid.dy;
    for (int64_t tile = piece.begin; tile < piece.end; ++tile) {
      const int64_t x = origin(tile, sx) + grid.dx, number = piece.first + tile - piece.begin;
      if (y >= 0 && y + (P - 1) * sy < p.H && x >= 0 && x + (P - 1) * sx < p.W) {
        const T* corner = image + y * st.row + x * st.column;
        const T* last = corner + (P - 1) * (row + column);
        int64_t c = c0;
        for (; c < c1 && last + c + L <= p.source_end; c += L)
          winograd_input_patch<M, C>([&](int i, int j) { return load(corner + i * row + j * column + c); },
                                     v_of(v, number, c), v_point);
        if (c < c1)
          winograd_input_patch<M, C>(
              [&](int i, int j) { return load_first(corner + i * row + j * column + c, c1 - c); }, v_of(v, number, c),
              v_point);
      } else {
        const T* pixels[kPoints];
        const T* last = image;
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < P; ++j) {
            const int64_t at_y = y + i * sy, at_x = x + j * sx;
            const bool in_image = at_y >= 0 && at_y < p.H && at_x >= 0 && at_x < p.W;
            pixels[i * P + j] = in_image ? image + at_y * st.row + at_x * st.column : zeros;
            if (in_image) last = pixels[i * P + j];
          }
        int64_t c = c0;
        for (; c < c1 && last + c + L <= p.source_end; c += L)
          winograd_input_patch<M, C>([&](int i, int j) { return load(pixels[i * P + j] + c); }, v_of(v, number, c),
                                     v_point);
        if (c < c1)
          winograd_input_patch<M, C>([&](int i, int j) { return load_first(pixels[i * P + j] + c, c1 - c); },
                                     v_of(v, number, c), v_point);
      }
    }
  }

  // n <= NR channels from c on: the piece's pixels, transposed and padded, lie in `strip`, [P][columns][NR].
  void transform_nchw(const Piece& piece, int64_t group, int64_t c, int64_t n, C* v, C* strip) const {
    const int64_t columns = (piece.end - piece.begin) * M + 2 * sx;
    const T* image = p.source + piece.image * p.source_strides.image + (group * p.in + c) * p.source_strides.channel;
    const int64_t x0 = piece.begin * M + grid.dx;  // a group of tiles begins here
    const int64_t low = std::clamp<int64_t>(-x0, 0, columns), high = std::clamp<int64_t>(p.W - x0, low, columns);
    const int vectors = static_cast<int>((n + L - 1) / L);
    for (int i = 0; i < P; ++i) {
      const int64_t y = origin(piece.row, sy) + grid.dy + i * sy;
      C* to = strip + i * columns * NR;
      if (y < 0 || y >= p.H) {
        zero_over(to, columns * NR);
        continue;
      }
      zero_over(to, low * NR);
      zero_over(to + high * NR, (columns - high) * NR);
      transpose_row(image + y * p.source_strides.row + x0 + low, high - low, n, to + low * NR);
    }
    for (int64_t tile = 0; tile < piece.end - piece.begin; ++tile)
      for (int j = 0; j < vectors; ++j) {
        const C* corner = strip + origin(tile, sx) * NR + j * L;
        winograd_input_patch<M, C>([&](int y, int x) { return load(corner + (y * columns + x * sx) * NR); },
                                   v_of(v, piece.first + tile, c + j * L), v_point);
      }
  }

  // `count` pixels of n <= NR channels to [pixel][NR]; missing channels up to a whole vector become zero.
  void transpose_row(const T* from, int64_t count, int64_t n, C* to) const {
    const int64_t channel = p.source_strides.channel;
    for (int64_t x = 0; x < count; x += L, from += L, to += L * NR) {
      const int64_t width = std::min<int64_t>(L, count - x);
      for (int64_t j = 0; j < n; j += L) {
        const T* row = from + j * channel;
        const int64_t rows = std::min<int64_t>(L, n - j);
        Vec<C> r[L];
        if (rows == L && row + (L - 1) * channel + L <= p.source_end) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) r[i] = load(row + i * channel);
        } else {
          for (int i = 0; i < L; ++i) r[i] = i < rows ? load_first(row + i * channel, width) : zero<C>();
        }
        transpose_in_place<C>(r);
        if (width == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(to + i * NR + j, r[i]);
        } else {
          for (int i = 0; i < width; ++i) store(to + i * NR + j, r[i]);
        }
      }
    }
  }

  // ---- products ------------------------------------------------------------------------------------------------------

  // products[panel][point][tile][NR] for `many` panels whose filter begins at u.
  void multiply(int64_t block, const C* v, const C* u, int64_t panel0, int64_t many, C* products) const {
    const EvenRows rows(count(block));
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t b = 0; b < s.blocks; ++b) {
        const int64_t depth = std::min(s.KC, s.in - b * s.KC);
        const C* a = v + point * v_point + b * per_block * s.KC;
        // While these are multiplied, the next are asked for: panels of the filter, then tiles.
        const bool last = b + 1 == s.blocks;
        const C* next_a = !last ? a + per_block * s.KC : point + 1 < kPoints ? v + (point + 1) * v_point : v;
        const C* next_u = u + many * depth * NR;
        int64_t turn = 0;
        for (int64_t panel = 0; panel < many; ++panel, u += depth * NR) {
          C* to = products + (panel * kPoints + point) * m_point;
          const bool half = p.out - (panel0 + panel) * NR <= L;
          for (int64_t tile = 0; tile < rows.tiles; ++tile, ++turn) {
            const int64_t q = rows.begin(tile);
            const C* ahead = turn < many ? next_u + turn * depth * NR : next_a + (turn - many) * depth * NR;
            with_exact_rows(rows.begin(tile + 1) - q, [&](auto h) {
              constexpr int ROWS = decltype(h)::value;
              if (half)
                multiply_tile<ROWS, 1>(a + q * s.KC, depth, u, b == 0, ahead, to + q * NR);
              else
                multiply_tile<ROWS, 2>(a + q * s.KC, depth, u, b == 0, ahead, to + q * NR);
            });
          }
        }
      }
  }

  // sums[i][:] (+)= sum over k < depth of a[i * KC + k] * u[k * NR + :]. Asks for a line of what follows u in each step.
  template <int ROWS, int VECTORS>
  FASTNN_INLINE void multiply_tile(const C* a, int64_t depth, const C* u, bool first, const C* ahead, C* to) const {
    Vec<C> acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = zero<C>();
    const C* row[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) row[i] = a + i * s.KC;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, u += NR) {
      Vec<C> column[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) column[j] = load(u + j * L);
      __builtin_prefetch(ahead + k * NR, 0, 3);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Vec<C> x = splat<C>(row[i][k]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(x, column[j], acc[i][j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j)
        store(to + i * NR + j * L, first ? acc[i][j] : acc[i][j] + load(to + i * NR + j * L));
  }

  // ---- A^T m A -------------------------------------------------------------------------------------------------------

  void transform_output(int64_t group, int64_t block, int64_t panel, const C* products, C* stage) const {
    const int64_t k = panel * NR, cols = std::min<int64_t>(NR, p.out - k), channel = group * p.out + k;
    alignas(64) C bias[NR];
    for (int64_t i = 0; i < NR; ++i) bias[i] = p.bias && i < cols ? load_one(p.bias + channel + i) : C(0);
    if (channels_last) return store_nhwc(block, channel, cols, bias, products);
    int64_t pixels = 0;
    for_each_piece(block, [&](const Piece& piece) {
      const int64_t width = std::min(piece.end * M, p.OW) - piece.begin * M;
      const int64_t height = inside(origin(piece.row, sy), sy, p.OH);
      for (int64_t tile = 0; tile < piece.end - piece.begin; ++tile)
        for (int64_t j = 0; j < cols; j += L) {
          C* to = stage + (pixels + origin(tile, sx)) * NR + j;
          const int64_t wide = inside(origin(tile, sx), sx, width);
          winograd_output_patch<M, C>(products + (piece.first + tile) * NR + j, m_point, load(bias + j),
                                      [&](int i, const Vec<C>* y) {
                                        if (i >= height) return;
#pragma GCC unroll 4
                                        for (int x = 0; x < M; ++x)
                                          if (x < wide) store(to + (i * width + x * sx) * NR, y[x]);
                                      });
        }
      pixels += width * height;
    });
    if (p.pre_activation) store_nchw(block, channel, cols, stage, p.pre_activation);
    if (!p.clamps()) activate_in_place<C>(p.activation, stage, pixels * NR);
    store_nchw(block, channel, cols, stage, p.target);
  }

  void store_nhwc(int64_t block, int64_t channel, int64_t cols, const C* bias, const C* products) const {
    const ImageStrides st = p.target_strides;
    const int64_t row = sy * st.row, column = sx * st.column;
    const bool direct = std::is_same_v<T, C> && p.clamps();
    for_each_piece(block, [&](const Piece& piece) {
      const int64_t y0 = origin(piece.row, sy), height = inside(y0, sy, p.OH);
      for (int64_t tile = piece.begin; tile < piece.end; ++tile) {
        const int64_t x0 = origin(tile, sx), width = inside(x0, sx, p.OW);
        const int64_t at = piece.image * st.image + y0 * st.row + x0 * st.column + channel;
        const C* from = products + (piece.first + tile - piece.begin) * NR;
        for (int64_t j = 0; j < cols; j += L)
          if (direct && width == M && height == M && cols - j >= L)
            winograd_output_patch<M, C>(from + j, m_point, load(bias + j), [&](int i, const Vec<C>* y) {
              T* to = p.target + at + j + i * row;
#pragma GCC unroll 4
              for (int x = 0; x < M; ++x, to += column) store(to, clamp(y[x]));
            });
          else
            winograd_output_patch<M, C>(from + j, m_point, load(bias + j), [&](int i, Vec<C>* y) {
              alignas(64) C sums[M * L];
              int64_t places[M];
              for (int x = 0; x < M; ++x) {
                store(sums + x * L, y[x]);
                places[x] = at + j + i * row + x * column;
              }
              if (i < height) store_sums<T>(p, sums, static_cast<int>(width), 1, cols - j, 1, places);
            });
      }
    });
  }

  // What relu and relu6 are, and None. A comparison with NaN is false: NaN stays.
  FASTNN_INLINE Vec<C> clamp(Vec<C> y) const { return vmin(splat(high), vmax(splat(low), y)); }

  // Pixels of the stage, [pixel][NR], to rows along pixels.
  void store_nchw(int64_t block, int64_t channel, int64_t cols, const C* stage, T* base) const {
    const ImageStrides& st = p.target_strides;
    T* run = nullptr;
    int64_t length = 0;
    auto add = [&](T* to, int64_t n) {
      if (run && to == run + length) return void(length += n);
      if (run) stage = store_run(stage, run, length, cols);
      run = to, length = n;
    };
    for_each_piece(block, [&](const Piece& piece) {
      const int64_t width = std::min(piece.end * M, p.OW) - piece.begin * M;
      const int64_t y0 = origin(piece.row, sy);
      T* to = base + piece.image * st.image + channel * st.channel + y0 * st.row + piece.begin * M;
      for (int64_t y = 0; y < inside(y0, sy, p.OH); ++y) add(to + y * sy * st.row, width);
    });
    store_run(stage, run, length, cols);
  }

  const C* store_run(const C* stage, T* to, int64_t count, int64_t cols) const {
    const int64_t channel = p.target_strides.channel;
    for (int64_t x = 0; x < count; x += L) {
      const int64_t width = std::min<int64_t>(L, count - x);
      for (int64_t j = 0; j < cols; j += L) {
        Vec<C> r[L];
        const C* from = stage + x * NR + j;
        if (width == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) r[i] = clamp(load(from + i * NR));
        } else {
          for (int i = 0; i < L; ++i) r[i] = i < width ? clamp(load(from + i * NR)) : zero<C>();
        }
        transpose_in_place<C>(r);
        T* row = to + x + j * channel;
        if (width == L && cols - j >= L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(row + i * channel, r[i]);
        } else {
          for (int i = 0; i < std::min<int64_t>(L, cols - j); ++i) store_first(row + i * channel, r[i], width);
        }
      }
    }
    return stage + count * NR;
  }

  // ---- schedule ------------------------------------------------------------------------------------------------------

  void run_panels(int64_t group, int64_t block, int64_t panel, const C* v, const C* u, C* products, C* stage) const {
    const int64_t many = std::min(s.per_group, s.panels - panel);
    multiply(block, v, u, panel, many, products);
    for (int64_t i = 0; i < many; ++i)
      transform_output(group, block, panel + i, products + i * kPoints * m_point, stage);
  }

  void run(int64_t group, const T* zeros) const {
    const int64_t panel_size = NR * s.in * kPoints;
    const int threads = worth_threads(p.threads, p.flops() / p.groups, 0);
    // Without a packed filter: as many panels at a time as fit in some MiB.
    const int64_t slab_bytes = 8 << 20;
    int64_t slab = s.panels;
    if (!p.packed) {
      slab = std::max<int64_t>(slab_bytes / std::max<int64_t>(panel_size * int64_t(sizeof(C)), 1), 1);
      slab = (std::min(slab, s.panels) + s.per_group - 1) / s.per_group * s.per_group;
      slab = std::min(slab, s.panels);
    }
    const bool shared = blocks == 1 || blocks < threads;  // few tiles: threads share V and split the output channels
    const int64_t own = m_size() + stage_size() + strip_size();
    Scratch<C> memory(threads * own + (shared ? blocks : threads) * v_size() + (p.packed ? 0 : slab * panel_size));
    C* const v0 = memory + threads * own;
    C* const u0 = v0 + (shared ? blocks : threads) * v_size();
    for (int64_t first = 0; first < s.panels; first += slab) {
      const int64_t last = std::min(first + slab, s.panels);
      const C* u = p.packed ? p.packed + group * s.panels * panel_size : u0;
      if (!p.packed) winograd_pack_panels<M>(p, grid, group, first, last, u0);
      const int64_t steps = (last - first + s.per_group - 1) / s.per_group;
      if (shared) {
        const int64_t chunks = (s.in + NR - 1) / NR;
        if (first == 0)
          each(chunks * blocks, threads, [&](int64_t task, int thread) {
            const int64_t block = task / chunks, c = task % chunks * NR;
            transform_input(group, block, c, std::min<int64_t>(c + NR, s.in), v0 + block * v_size(),
                            memory + thread * own + m_size() + stage_size(), zeros);
          });
        each(steps * blocks, threads, [&](int64_t task, int thread) {
          const int64_t block = task / steps, panel = first + task % steps * s.per_group;
          C* mine = memory + thread * own;
          run_panels(group, block, panel, v0 + block * v_size(), u + (panel - first) * panel_size, mine,
                     mine + m_size());
        });
      } else {
        each(blocks, threads, [&](int64_t block, int thread) {
          C *mine = memory + thread * own, *v = v0 + thread * v_size();
          transform_input(group, block, 0, s.in, v, mine + m_size() + stage_size(), zeros);
          for (int64_t panel = first; panel < last; panel += s.per_group)
            run_panels(group, block, panel, v, u + (panel - first) * panel_size, mine, mine + m_size());
        });
      }
    }
  }

  template <class F>
  static void each(int64_t tasks, int threads, const F& f) {
    TaskQueue queue(tasks);
    parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int thread, int) {
      for (int64_t task; queue.take(task);) f(task, thread);
    });
  }
};

template <int M, class T>
void conv2d_winograd(const Conv2dPass<T>& p, bool channels_last) {
  const WinogradGrid grid(p);
  constexpr int L = kLanes<Compute<T>>;
  Scratch<T> zeros(channels_last ? p.in + L : 0);
  if (channels_last) std::memset(static_cast<void*>(zeros.data()), 0, sizeof(T) * (p.in + L));
  const Winograd<T, M> w(p, grid, channels_last);
  for (int64_t g = 0; g < p.groups; ++g) w.run(g, zeros);
}

}  // namespace fastnn::cpu::FASTNN_ISA

// Gradient of the input where windows do not overlap (patches of a vision transformer, 2x2 at stride 2): one GEMM,
// [pixels of grad_output, out] x [out, a patch], whose tiles are scattered to where their patches lie.
//
// As passes, one for each pixel of a window, 16 x 16 patches of 3 channels were 256 products with 3 columns each: 27 ms
// where this takes 3. A patch's elements are those of a weight's row, in the memory format of both, so that they fall
// into runs: a row of the window of one channel (NCHW), or of all (NHWC).
#pragma once

#include "cpu/conv2d_pass.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Pixels of all images as the rows of A, channels as the depth.
template <class T>
struct ImagePixels {
  using C = Compute<T>;
  const T* data;
  ImageStrides strides;  // rows of pixels follow one another
  int64_t area;

  const C* panel(int64_t m0, int64_t rows, int64_t k0, int64_t depth, C* scratch) const {
    const RowTiles<C> tiles(rows);
    for (int64_t t = 0; t < tiles.count; ++t) {
      C* const to = scratch + t * kMR<C> * depth;
      const int64_t m = m0 + tiles.begin(t), count = tiles.begin(t + 1) - tiles.begin(t);
      if (m / area == (m + count - 1) / area) {
        pack_panel<kMR<C>>(pixel(m) + k0 * strides.channel, strides.column, strides.channel, count, depth, to);
        continue;
      }
      for (int64_t i = 0; i < kMR<C>; ++i)
        for (int64_t k = 0; k < depth; ++k)
          to[k * kMR<C> + i] = i < count ? load_one(pixel(m + i) + (k0 + k) * strides.channel) : C(0);
    }
    return scratch;
  }
  const T* pixel(int64_t m) const { return data + m / area * strides.image + m % area * strides.column; }
};

// Row m of C is the patch of pixel m, column n element n of it.
template <class T>
struct PatchStore {
  using C = Compute<T>;
  const Conv2dShape& s;
  T* target;
  ImageStrides to;
  int64_t unit, run;  // elements of a pixel in a run, and of a run

  C* in_place(int64_t, int64_t, int64_t&) const { return nullptr; }
  template <int ROWS>
  bool direct(const TilePlace<C>&, Tile<C, ROWS>&) const {
    return false;
  }
  __attribute__((noinline)) void finish(const TilePlace<C>& place, const C* tile) const {
    for (int64_t n = place.n; n < place.n + place.cols;) {
      const int64_t line = n / run, first = n % run, count = std::min(run - first, place.n + place.cols - n);
      const int64_t channel = s.channels_last ? 0 : line / s.R, r = line % s.R;
      int64_t image = place.m / (s.OH * s.OW), rest = place.m % (s.OH * s.OW), oy = rest / s.OW, ox = rest % s.OW;
      const C* from = tile + n - place.n;
      for (int64_t i = 0; i < place.rows; ++i, from += kNR<C>) {
        const int64_t y = oy * s.stride_h + r - s.pad_top, x = ox * s.stride_w - s.pad_left;
        // Elements [low, high) of the run lie inside the image.
        const int64_t low = std::max(first, -x * unit), high = std::min(first + count, (s.W - x) * unit);
        if (y >= 0 && y < s.H && low < high)
          copy_run(target + image * to.image + channel * to.channel + y * to.row + x * to.column + low,
                   from + low - first, high - low);
        if (++ox < s.OW) continue;
        ox = 0;
        if (++oy == s.OH) oy = 0, ++image;
      }
      n += count;
    }
  }
};

// Windows apart from one another, in one group, and a weight whose rows lie as a patch does. Passes with channels and
// pixels enough for a product of their own store whole rows, and took 0.5 to 0.9 of the time.
inline bool conv2d_grad_patches_serves(const Conv2dShape& s, const ImageStrides& weight) {
  if (s.C >= 16 && s.N * s.OH * s.OW >= 64) return false;
  if (s.groups != 1 || s.R * s.S == 1 || s.R > s.stride_h || s.S > s.stride_w) return false;
  if ((s.dilation_h > 1 && s.R > 1) || (s.dilation_w > 1 && s.S > 1)) return false;
  const ImageStrides dense = dense_strides(s.C, s.R, s.S, s.channels_last);
  return (weight.channel == dense.channel || s.C == 1) && (weight.row == dense.row || s.R == 1) &&
         (weight.column == dense.column || s.S == 1);
}

template <class T>
void conv2d_grad_patches(const Conv2dBackwardParams& params, const ImageStrides& from, const ImageStrides& to) {
  using C = Compute<T>;
  const Conv2dShape& s = params.shape;
  T* const target = static_cast<T*>(params.grad_input);
  const bool covered = s.pad_top == 0 && s.pad_left == 0 && s.R == s.stride_h && s.S == s.stride_w &&
                       s.OH * s.R == s.H && s.OW * s.S == s.W;
  if (!covered) clear(target, to, s.N, s.C, s.H, s.W);
  const int64_t unit = s.channels_last ? s.C : 1;
  gemm<C>(s.N * s.OH * s.OW, s.C * s.R * s.S, s.K,
          ImagePixels<T>{static_cast<const T*>(params.grad_output), from, s.OH * s.OW},
          StridedB<C, T>{static_cast<const T*>(params.weight), params.weight_strides.image, 1},
          PatchStore<T>{s, target, to, unit, s.S * unit}, params.threads);
}

}  // namespace fastnn::cpu::FASTNN_ISA

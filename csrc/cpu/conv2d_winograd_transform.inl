// Winograd's minimal filtering F(M x M, 3 x 3): the transforms, on vectors whose lanes are channels.
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A,   d a patch of (M + 2)^2 pixels, g a 3 x 3 filter, Y M x M outputs
//
// (Lavin and Gray, arXiv 1509.09308.) Interpolation points: 0, 1, -1, infinity for M = 2; 0, 5/8, -5/8, 3/2, -3/2,
// infinity for M = 4. Over the symmetric points +-a, +-b on a grid of 1/16 this pair has the smallest error within 1%: with
// 64 channels of normal data 0.46 of the root mean square error of the usual 1, 2 (Barabasz et al., arXiv 1803.10986, Alam
// et al., arXiv 2201.10369), at one more operation in the output transform, and all entries of A and B are exact in float.
#pragma once

#include "cpu/conv2d_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

// The taps as a 3 x 3 grid: where its corner lies, how far apart its rows and columns are, and the weight of (r, s).
struct WinogradGrid {
  bool fits = false;
  int64_t dy = 0, dx = 0, step_y = 1, step_x = 1, weight[9];
  bool dense = true;  // the nine weights lie next to each other

  template <class T>
  explicit WinogradGrid(const Conv2dPass<T>& p) {
    if (p.tap_count != 9 || p.step_h != 1 || p.step_w != 1) return;
    const TapBox box(p);
    dy = box.y0, dx = box.x0;
    step_y = (box.y1 - dy) / 2, step_x = (box.x1 - dx) / 2;
    if (step_y < 1 || step_x < 1) return;
    int found = 0;
    for (int64_t t = 0; t < 9; ++t) {
      const int64_t y = p.taps[t].dy - dy, x = p.taps[t].dx - dx, at = y / step_y * 3 + x / step_x;
      if (y % step_y || x % step_x || at >= 9) return;
      weight[at] = p.taps[t].weight;
      found |= 1 << at;
      dense &= weight[at] < 9;
    }
    fits = found == 0x1ff;
  }
};

// One dimension of each transform. `in` and `out` do not overlap.
template <int M, class C>
FASTNN_INLINE void winograd_input(const Vec<C>* d, Vec<C>* t) {
  if constexpr (M == 2) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  } else {
    constexpr C a = C(5. / 8), b = C(3. / 2), aa = a * a, bb = b * b;
    const Vec<C> even_a = d[4] - d[2] * bb, odd_a = d[3] - d[1] * bb;
    const Vec<C> even_b = d[4] - d[2] * aa, odd_b = d[3] - d[1] * aa;
    t[0] = d[0] * (aa * bb) + (d[4] - d[2] * (aa + bb));
    t[1] = even_a + odd_a * a;
    t[2] = even_a - odd_a * a;
    t[3] = even_b + odd_b * b;
    t[4] = even_b - odd_b * b;
    t[5] = d[1] * (aa * bb) + (d[5] - d[3] * (aa + bb));
  }
}
template <int M, class C>
FASTNN_INLINE void winograd_filter(const Vec<C>* g, Vec<C>* u) {
  if constexpr (M == 2) {
    const Vec<C> even = (g[0] + g[2]) * C(0.5), odd = g[1] * C(0.5);
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  } else {
    constexpr double a = 5. / 8, b = 3. / 2, aa = a * a, bb = b * b;
    constexpr C na = C(1 / (2 * aa * (aa - bb))), nb = C(1 / (2 * bb * (bb - aa)));
    const Vec<C> even_a = g[0] * na + g[2] * C(na * aa), odd_a = g[1] * C(na * a);
    const Vec<C> even_b = g[0] * nb + g[2] * C(nb * bb), odd_b = g[1] * C(nb * b);
    u[0] = g[0] * C(1 / (aa * bb));
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
}
// y += A^T m, y holding what is to be added (a bias, or zeros).
template <int M, class C>
FASTNN_INLINE void winograd_output(const Vec<C>* m, Vec<C> bias, Vec<C>* y) {
  if constexpr (M == 2) {
    y[0] = (m[0] + bias) + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + (bias - m[3]);
  } else {
    constexpr C a = C(5. / 8), b = C(3. / 2), aa = a * a, bb = b * b;
    const Vec<C> sum_a = m[1] + m[2], sum_b = m[3] + m[4], odd_a = m[1] - m[2], odd_b = m[3] - m[4];
    y[0] = (m[0] + bias) + (sum_a + sum_b);
    y[1] = odd_b * b + (odd_a * a + bias);
    y[2] = sum_b * bb + (sum_a * aa + bias);
    y[3] = (odd_b * (b * bb) + odd_a * (a * aa)) + (m[5] + bias);
  }
}

// B^T d B of one vector of channels: pixel(i, j) loads one of the patch, element (i, j) of the result goes to
// to[(i * P + j) * stride]. The outer loops stay loops: unrolled, GCC keeps an address for each of the elements.
template <int M, class C, class Load>
FASTNN_INLINE void winograd_input_patch(const Load& pixel, C* to, int64_t stride) {
  constexpr int P = M + 2;
  Vec<C> rows[P][P];
#pragma GCC unroll 1
  for (int j = 0; j < P; ++j) {
    Vec<C> column[P], t[P];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) column[i] = pixel(i, j);
    winograd_input<M, C>(column, t);
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) rows[i][j] = t[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < P; ++i, to += P * stride) {
    Vec<C> t[P];
    winograd_input<M, C>(rows[i], t);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) store(to + j * stride, t[j]);
  }
}

// A^T m A + bias of one vector of channels; put(i, y) takes row i.
template <int M, class C, class Put>
FASTNN_INLINE void winograd_output_patch(const C* from, int64_t stride, Vec<C> bias, const Put& put) {
  constexpr int P = M + 2;
  Vec<C> rows[M][P];
#pragma GCC unroll 1
  for (int j = 0; j < P; ++j, from += stride) {
    Vec<C> column[P], y[M];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) column[i] = load(from + i * (P * stride));
    winograd_output<M, C>(column, zero<C>(), y);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) rows[i][j] = y[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < M; ++i) {
    Vec<C> y[M];
    winograd_output<M, C>(rows[i], bias, y);
    put(i, y);
  }
}

// G g G^T of one vector of output channels: tap (r, s) lies at g[r * 3 + s], element (i, j) goes to
// to[(i * P + j) * stride].
template <int M, class C>
FASTNN_INLINE void winograd_filter_patch(const C* const* g, int64_t offset, C* to, int64_t stride) {
  constexpr int P = M + 2;
  Vec<C> rows[P][3];
#pragma GCC unroll 1
  for (int s = 0; s < 3; ++s) {
    const Vec<C> column[3] = {load(g[s] + offset), load(g[3 + s] + offset), load(g[6 + s] + offset)};
    Vec<C> u[P];
    winograd_filter<M, C>(column, u);
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) rows[i][s] = u[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < P; ++i, to += P * stride) {
    Vec<C> u[P];
    winograd_filter<M, C>(rows[i], u);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) store(to + j * stride, u[j]);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA

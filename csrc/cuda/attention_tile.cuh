// Tiles of queries, keys and values in shared memory, and the products of such tiles on tensor cores.
//
// A tile of WIDTH features lies as panels of 64 features, the last of 64 or 32, each swizzled as in tile.cuh, so that a
// row of any tile has a power of two of chunks.
#pragma once

#include "cuda/attention_scores.cuh"
#include "cuda/tile.cuh"

namespace fastnn::cuda {

// In bytes: where chunk c + more of row r lies, both of the same panel.
template <int WIDTH, int ROWS>
FASTNN_DEVICE int panel_place(int r, int c, int more = 0) {
  const int panel = c / 8, at = panel * ROWS * 128;
  if (WIDTH % 64 == 0 || panel < WIDTH / 64) return at + 16 * swizzled<8>(r, c % 8 + more);
  return at + 16 * swizzled<4>(r, c % 8 + more);
}

// 16 bytes of a row that lies in any way, or zeros.
FASTNN_DEVICE void copy_gathered(unsigned char* to, const uint16_t* from, int64_t stride, int count) {
  Vector<uint32_t, 4> words;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = 2 * j < count ? from[2 * j * stride] : 0;
    const uint32_t high = 2 * j + 1 < count ? from[(2 * j + 1) * stride] : 0;
    words.data[j] = low | high << 16;
  }
  ptx::shared_store(to, words);
}

// Rows first .. first + ROWS, by all threads; the caller commits and waits.
template <int WIDTH, int ROWS, int THREADS>
FASTNN_DEVICE void copy_panels(unsigned char* to, const RowMatrix& matrix, int64_t first,
                               int thread = static_cast<int>(threadIdx.x)) {
// Before sm_80 a copy is a load and a store: few at a time, or registers run out.
#pragma unroll(kArch >= 800 ? WIDTH / 8 : 1)
  for (int c = 0; c + 8 <= WIDTH / 8; c += 8)
    copy_tile<ROWS, 8, THREADS>(to + c / 8 * ROWS * 128, matrix, first, 8 * c, thread);
  if constexpr (WIDTH % 64 == 32)
    copy_tile<ROWS, 4, THREADS>(to + WIDTH / 64 * ROWS * 128, matrix, first, WIDTH / 64 * 64, thread);
}
template <int WIDTH, int ROWS, int THREADS>
FASTNN_DEVICE void copy_positions(unsigned char* to, const RowMatrix& matrix, int64_t col_stride, int first,
                                  int thread = static_cast<int>(threadIdx.x)) {
  if (col_stride == 1) return copy_panels<WIDTH, ROWS, THREADS>(to, matrix, first, thread);
#pragma unroll 1
  for (int index = thread; index < ROWS * (WIDTH / 8); index += THREADS) {
    const int r = index / (WIDTH / 8), c = index % (WIDTH / 8);
    const int count = first + r < matrix.rows ? cut(static_cast<int>(matrix.cols) - 8 * c, 0, 8) : 0;
    copy_gathered(to + panel_place<WIDTH, ROWS>(r, c), matrix.data + (first + r) * matrix.ld + 8 * c * col_stride,
                  col_stride, count);
  }
}

// s += a bᵀ: rows `row` … of tile a by rows `col` … of tile b, over all features. UNROLL: how many of its steps' loads may
// run ahead, in registers.
template <class T, int WIDTH, int ROWS_A, int ROWS_B, int UNROLL = WIDTH / 16, int M, int N>
FASTNN_DEVICE void multiply_rows(float (&s)[M][N][4], const unsigned char* a, int row, const unsigned char* b, int col,
                                 int lane) {
#pragma unroll(kArch >= 800 ? UNROLL : 1)  // sm_75 has no registers to spare for loads ahead
  for (int d = 0; d < WIDTH / 8; d += 2) {
    uint32_t left[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i)
      ptx::ldmatrix_x4(left[i], a + panel_place<WIDTH, ROWS_A>(row + 16 * i + lane % 16, d, lane / 16));
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b + panel_place<WIDTH, ROWS_B>(col + 8 * j + lane / 16 * 8 + lane % 8, d, lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma_m16n8k16(s[i][j], left[i], {right[0], right[1]}, T{});
        ptx::mma_m16n8k16(s[i][j + 1], left[i], {right[2], right[3]}, T{});
      }
    }
  }
}

// What a product left as accumulators, rounded, as the left operand of the next: columns 8 k … 8 k + 16.
template <class T, int M, int N>
FASTNN_DEVICE void rounded(uint32_t (&a)[M][4], const float (&s)[M][N][4], int k) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[i][j] = ptx::pack_pair(s[i][k + j / 2][j % 2 * 2], s[i][k + j / 2][j % 2 * 2 + 1], T{});
}

// out += a b: 16 columns of a by as many rows, from `row`, of tile b; chunk `chunk` of them and those behind.
template <class T, int WIDTH, int ROWS, int M, int N>
FASTNN_DEVICE void multiply_columns(float (&out)[M][N][4], const uint32_t (&a)[M][4], const unsigned char* b, int row,
                                    int chunk, int lane) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t right[4];
    ptx::ldmatrix_x4_trans(right, b + panel_place<WIDTH, ROWS>(row + lane % 16, chunk + n, lane / 16));
#pragma unroll
    for (int i = 0; i < M; ++i) {
      ptx::mma_m16n8k16(out[i][n], a[i], {right[0], right[1]}, T{});
      ptx::mma_m16n8k16(out[i][n + 1], a[i], {right[2], right[3]}, T{});
    }
  }
}

// tanh(x) within 2^-22: enough beside scores whose operands have 11 bits.
FASTNN_DEVICE float tanh_approximate(float x) {
  return 1.0f - ptx::divide(2.0f, 1.0f + ptx::exp2_approximate(x * (2 * kLog2E<float>)));
}

}  // namespace fastnn::cuda

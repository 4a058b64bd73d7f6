// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias) without tensor cores: float32 in full precision, float64, and operands of any
// strides in every dtype.
//
// A block of 16x16 threads makes a tile of 128x128 (float32) or 64x64, a thread four rows by four columns of each
// quarter of it, in steps of 8 along K. Tiles of A and B lie with K as the slow dimension, so that a thread reads its
// four rows and its four columns as vectors; cp.async brings them there element by element, which turns any layout into
// that one, through a ring of four stages (16-bit operands are converted on the way, by loads and stores). Neighbouring
// threads take elements that are neighbours in memory, whichever dimension is dense.
//
// Bound by the FMA units for large K: 64 multiply-adds for four loads of 16 bytes. No figure: not yet measured on a
// GPU.
#pragma once

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/tile.cuh"

namespace fastnn::cuda {

struct StridedMatrix {
  const void* data;
  int64_t row, col;  // strides in elements
  int64_t rows, cols;
};

struct LinearSimt {
  StridedMatrix a;  // [M, K]
  StridedMatrix b;  // [N, K]
  int64_t k_per_split;
  int64_t tiles_m, tiles_n;
  LinearEpilogue epilogue;
};

template <class T, int TILE>
struct LinearSimtKernel {
  using C = Compute<T>;
  static constexpr LinearTile tile = kSimtTiles[TILE];
  static constexpr int kStages = 4, kQuarters = tile.m / 64;
  // Four elements more than the tile: the transposing stores of a warp spread over the banks, vectors stay aligned.
  static constexpr int kPitch = tile.m + 4, kOperand = tile.k * kPitch, kStage = 2 * kOperand;
  static constexpr int kStaging = 64 * tile.n;
  static constexpr int kSharedBytes =
      static_cast<int>(sizeof(C)) * (kStages * kStage > kStaging ? kStages * kStage : kStaging);
  static constexpr int kEach = tile.m * tile.k / tile.threads;  // elements of an operand that a thread copies
  static_assert(tile.m == tile.n && tile.threads == 256);

  static FASTNN_DEVICE void copy(C* to, const StridedMatrix& matrix, int64_t side, int64_t k) {
    const T* const data = static_cast<const T*>(matrix.data);
    const bool along_k = matrix.col == 1;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * tile.threads;
      const int s = along_k ? index / tile.k : index % tile.m, kk = along_k ? index % tile.k : index / tile.m;
      const bool inside = side + s < matrix.rows && k + kk < matrix.cols;
      const T* const from = inside ? data + (side + s) * matrix.row + (k + kk) * matrix.col : data;
      if constexpr (sizeof(T) == sizeof(C))
        ptx::cp_async<sizeof(C)>(to + kk * kPitch + s, from, inside ? static_cast<int>(sizeof(C)) : 0);
      else
        ptx::shared_store<C>(to + kk * kPitch + s, inside ? widen(*from) : C(0));
    }
  }

  static FASTNN_DEVICE void run(const LinearSimt& p) {
    C* const shared = reinterpret_cast<C*>(ptx::dynamic_shared());
    const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
    const TilePlace place = tile_place(blockIdx.x, p.tiles_m, p.tiles_n);
    const int64_t m = place.m * tile.m, n = place.n * tile.n, K = p.a.cols;
    const int split = static_cast<int>(blockIdx.y);
    const int64_t k_begin = split * p.k_per_split, k_left = K - k_begin < p.k_per_split ? K - k_begin : p.k_per_split;
    const int steps = static_cast<int>((k_left + tile.k - 1) / tile.k);

    const auto load_step = [&](int step) {
      if (step < steps) {
        C* const stage = shared + step % kStages * kStage;
        copy(stage, p.a, m, k_begin + int64_t{step} * tile.k);
        copy(stage + kOperand, p.b, n, k_begin + int64_t{step} * tile.k);
      }
      ptx::cp_async_commit();
    };

    C sums[kQuarters][kQuarters][4][4] = {};
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load_step(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      load_step(step + kStages - 1);
      const C* const a = shared + step % kStages * kStage + 4 * ty;
      const C* const b = shared + step % kStages * kStage + kOperand + 4 * tx;
#pragma unroll
      for (int k = 0; k < tile.k; ++k) {
        Vector<C, 4> rows[kQuarters], cols[kQuarters];
#pragma unroll
        for (int q = 0; q < kQuarters; ++q) rows[q] = load_four(a + k * kPitch + 64 * q);
#pragma unroll
        for (int q = 0; q < kQuarters; ++q) cols[q] = load_four(b + k * kPitch + 64 * q);
#pragma unroll
        for (int qm = 0; qm < kQuarters; ++qm)
#pragma unroll
          for (int qn = 0; qn < kQuarters; ++qn)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j) sums[qm][qn][i][j] += rows[qm].data[i] * cols[qn].data[j];
      }
    }
    ptx::cp_async_wait<0>();

#pragma unroll
    for (int pass = 0; pass < kQuarters; ++pass) {
      __syncthreads();
#pragma unroll
      for (int q = 0; q < kQuarters; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          C* const to = shared + staged<tile.n>(4 * ty + i, 64 * q + 4 * tx);
          constexpr int L = kLanes<C>;
#pragma unroll
          for (int j = 0; j < 4; j += L) {
            Vector<C, L> part;
#pragma unroll
            for (int l = 0; l < L; ++l) part.data[l] = sums[pass][q][i][j + l];
            ptx::shared_store(to + j, part);
          }
        }
      __syncthreads();
      linear_finish_tile<T, 64, tile.n, tile.threads>(p.epilogue, m + 64 * pass, n, split, shared);
    }
  }

  static FASTNN_DEVICE Vector<C, 4> load_four(const C* from) {
    constexpr int L = kLanes<C>;
    Vector<C, 4> four;
#pragma unroll
    for (int j = 0; j < 4; j += L) {
      const auto part = ptx::shared_load<Vector<C, L>>(from + j);
#pragma unroll
      for (int l = 0; l < L; ++l) four.data[j + l] = part.data[l];
    }
    return four;
  }
};

template <class T, int TILE>
__global__ void __launch_bounds__(kSimtTiles[TILE].threads, 2)
    linear_simt_kernel(__grid_constant__ const LinearSimt p) {
  LinearSimtKernel<T, TILE>::run(p);
}

}  // namespace fastnn::cuda

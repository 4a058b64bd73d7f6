// y[M, N] = f(x[M, K] · W[N, K]ᵀ + bias) for M <= 8, K dense in both: W is streamed once, nothing of it is kept.
//
// A block has 16 rows of W, and its four warps share K in turns: of 128 elements, or of 32 vectors. 16-bit: a warp's
// W is the A operand of m16n8k16 and x the B operand, so that eight rows of x cost as much as one. K may be taken in
// any order as long as both operands agree: thread t of a row loads eight elements that follow each other, 16 bytes
// straight to registers, and gives four of them to each of two multiplications. float32, float64: dot products of a
// warp on four rows of W, its lanes along K. The warps' sums are added in their order, then blockIdx.y's (splits) by
// linear_reduce_kernel.
//
// Bound by memory: 4 KiB of W are asked for at a time by a warp. No figure: not yet measured on a GPU.
#pragma once

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"

namespace fastnn::cuda {

struct LinearGemv {
  const void* x;  // [M, K], row stride x_ld
  int64_t x_ld;
  const void* w;  // [N, K], row stride w_ld
  int64_t w_ld;
  int64_t K, k_per_split;
  bool vector;  // every row of x and w starts at a multiple of 16 bytes
  LinearEpilogue epilogue;
};

// Elements k .. k + 16 bytes of a row, zeros from `end` on or where the row is not there.
template <class T>
FASTNN_DEVICE Vector<T, kLanes<T>> load_along(const T* row, int64_t k, int64_t end, bool vector) {
  constexpr int W = kLanes<T>;
  Vector<T, W> values{};
  if (!row || k >= end) return values;
  if (vector && k + W <= end) return *reinterpret_cast<const Vector<T, W>*>(row + k);
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (k + i < end) values.data[i] = row[k + i];
  return values;
}

// Adds up what the four warps left in shared memory, [4][8][16], and finishes: one thread, one output.
template <class T>
FASTNN_DEVICE void linear_gemv_finish(const LinearEpilogue& e, int64_t n, int split, const Compute<T>* shared) {
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x) / 16, col = static_cast<int>(threadIdx.x) % 16;
  if (m >= e.M || n + col >= e.N) return;
  Vector<Compute<T>, 1> sum{};
#pragma unroll
  for (int warp = 0; warp < 4; ++warp) sum.data[0] += ptx::shared_load<Compute<T>>(shared + (warp * 8 + m) * 16 + col);
  if (e.partial)
    static_cast<Compute<T>*>(e.partial)[(split * e.M + m) * e.N + n + col] = sum.data[0];
  else
    linear_finish<T, 1>(e, m, n + col, 1, sum);
}

template <class T>
__global__ void __launch_bounds__(128) linear_gemv_mma_kernel(__grid_constant__ const LinearGemv p) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4, split = static_cast<int>(blockIdx.y);
  const int64_t n = int64_t{blockIdx.x} * 16, M = p.epilogue.M, N = p.epilogue.N;
  const int64_t begin = split * p.k_per_split, end = begin + p.k_per_split < p.K ? begin + p.k_per_split : p.K;
  const T *const w = static_cast<const T*>(p.w), *const x = static_cast<const T*>(p.x);
  const T* const upper = n + g < N ? w + (n + g) * p.w_ld : nullptr;
  const T* const lower = n + g + 8 < N ? w + (n + g + 8) * p.w_ld : nullptr;
  const T* const row = g < M ? x + g * p.x_ld : nullptr;
  float sums[4] = {};
#pragma unroll 1
  for (int64_t k = begin + warp * 128 + t * 8; k < end + t * 8; k += 512) {  // the same number of times for all lanes
    Vector<T, 8> above[4], below[4], across[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      above[i] = load_along(upper, k + 32 * i, end, p.vector);
      below[i] = load_along(lower, k + 32 * i, end, p.vector);
      across[i] = load_along(row, k + 32 * i, end, p.vector);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto u = bitcast<Vector<uint32_t, 4>>(above[i]), l = bitcast<Vector<uint32_t, 4>>(below[i]);
      const auto b = bitcast<Vector<uint32_t, 4>>(across[i]);
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        ptx::mma_m16n8k16(sums, {u.data[j], l.data[j], u.data[j + 1], l.data[j + 1]}, {b.data[j], b.data[j + 1]}, T{});
    }
  }
  float* const shared = reinterpret_cast<float*>(ptx::dynamic_shared());
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::shared_store(shared + (warp * 8 + 2 * t + i % 2) * 16 + g + i / 2 * 8, sums[i]);
  linear_gemv_finish<T>(p.epilogue, n, split, shared);
}

// ROWS: the most rows of x that are there, 1 or 8.
template <class T, int ROWS>
__global__ void __launch_bounds__(128) linear_gemv_fma_kernel(__grid_constant__ const LinearGemv p) {
  constexpr int W = kLanes<T>, COLS = 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int split = static_cast<int>(blockIdx.y);
  const int64_t n = int64_t{blockIdx.x} * 16, M = p.epilogue.M, N = p.epilogue.N;
  const int64_t begin = split * p.k_per_split, end = begin + p.k_per_split < p.K ? begin + p.k_per_split : p.K;
  const T *const w = static_cast<const T*>(p.w), *const x = static_cast<const T*>(p.x);
  T* const shared = reinterpret_cast<T*>(ptx::dynamic_shared());
#pragma unroll 1
  for (int first = 0; first < 16; first += COLS) {
    T sums[ROWS][COLS] = {};
#pragma unroll 1
    for (int64_t k = begin + (warp * 32 + lane) * W; k < end; k += 128 * W) {
      Vector<T, W> weights[COLS];
#pragma unroll
      for (int j = 0; j < COLS; ++j)
        weights[j] = load_along(n + first + j < N ? w + (n + first + j) * p.w_ld : nullptr, k, end, p.vector);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const auto values = load_along(m < M ? x + m * p.x_ld : nullptr, k, end, p.vector);
#pragma unroll
        for (int j = 0; j < COLS; ++j)
#pragma unroll
          for (int i = 0; i < W; ++i) sums[m][j] += values.data[i] * weights[j].data[i];
      }
    }
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int j = 0; j < COLS; ++j) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) sums[m][j] += __shfl_xor_sync(0xffffffffu, sums[m][j], apart);
        if (lane == 0) ptx::shared_store(shared + (warp * 8 + m) * 16 + first + j, sums[m][j]);
      }
  }
  linear_gemv_finish<T>(p.epilogue, n, split, shared);
}

}  // namespace fastnn::cuda

// What happens to a tile of sums: bias, pre-activation kept where it is wanted, activation, conversion, one store.
//
// The sums pass through shared memory, so that a thread has 16 bytes of consecutive outputs whatever the fragment
// layout was, and the activation's code stands once, in a loop, when the accumulators' registers are free.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/storage.cuh"

namespace fastnn::cuda {

struct LinearEpilogue {
  void* output;         // [M, N], row stride N
  void* preactivation;  // [M, N] or nullptr
  const void* bias;     // [N] or nullptr
  void* partial;        // [splits, M, N] of the compute type, or nullptr: then sums go there and nothing else is done
  int64_t M, N;
  Activation activation;
  bool vector;  // 16 bytes at once: N and the pointers allow it
};

// Rows whose `count` elements may be stored as one vector where `vector` says so.
template <class T, int W>
FASTNN_DEVICE void store_row(T* to, const Vector<T, W>& values, int count, bool vector) {
  if constexpr (sizeof(values) == 16)
    if (vector && count == W) return ptx::global_store_16(to, values);
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (i < count) to[i] = values.data[i];
}

// Elements (m, n) .. (m, n + count) of the output, count <= W; `values` are sums over all of K.
template <class T, int W>
FASTNN_DEVICE void linear_finish(const LinearEpilogue& e, int64_t m, int64_t n, int count,
                                 Vector<Compute<T>, W>& values) {
  const int64_t at = m * e.N + n;
  Vector<T, W> stored;
  if (e.bias) {
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (i < count) values.data[i] += widen(static_cast<const T*>(e.bias)[n + i]);
  }
  if (e.preactivation) {
#pragma unroll
    for (int i = 0; i < W; ++i) stored.data[i] = narrow<T>(values.data[i]);
    store_row(static_cast<T*>(e.preactivation) + at, stored, count, e.vector);
  }
#pragma unroll
  for (int i = 0; i < W; ++i) stored.data[i] = narrow<T>(activate(e.activation, values.data[i]));
  store_row(static_cast<T*>(e.output) + at, stored, count, e.vector);
}

// Where the sum (row, col) of a staged tile of COLS columns lies. Groups of eight columns are swizzled by the row, so
// that the fragments of mma.sync, two columns of eight rows, are stored without bank conflicts.
template <int COLS>
FASTNN_HOST_DEVICE constexpr int staged(int row, int col) {
  static_assert(COLS % 32 == 0);
  return row * COLS + (col / 8 ^ (row & 3)) * 8 + col % 8;
}

// Sends ROWS x COLS staged sums, whose first is output (m, n), on their way. By THREADS threads, behind a barrier.
template <class T, int ROWS, int COLS, int THREADS>
FASTNN_DEVICE void linear_finish_tile(const LinearEpilogue& e, int64_t m, int64_t n, int split,
                                      const Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int W = kLanes<T>, L = kLanes<C>;
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x) * W; index < ROWS * COLS; index += THREADS * W) {
    const int row = index / COLS, col = index % COLS;
    if (m + row >= e.M || n + col >= e.N) continue;
    const int count = static_cast<int>(e.N - n - col < W ? e.N - n - col : W);
    Vector<C, W> values;
#pragma unroll
    for (int i = 0; i < W; i += L) {
      const auto part = ptx::shared_load<Vector<C, L>>(sums + staged<COLS>(row, col + i));
#pragma unroll
      for (int j = 0; j < L; ++j) values.data[i + j] = part.data[j];
    }
    if (e.partial)
      store_row(static_cast<C*>(e.partial) + (split * e.M + m + row) * e.N + n + col, values, count, false);
    else
      linear_finish<T, W>(e, m + row, n + col, count, values);
  }
}

// The same of the fragments of mma.sync: a warp has ROWS x COLS of them, from row warp_m * 16 ROWS and column `col` of
// the tile on, and WARPS_M rows of warps are staged one after the other.
template <class T, int TILE_N, int THREADS, int WARPS_M, int ROWS, int COLS>
FASTNN_DEVICE void linear_finish_fragments(const LinearEpilogue& e, int64_t m, int64_t n, int split, float* staging,
                                           const float (&sums)[ROWS][COLS][4], int warp_m, int col) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int pass = 0; pass < WARPS_M; ++pass) {
    __syncthreads();  // nobody reads what is overwritten now
    if (warp_m == pass) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLS; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            ptx::shared_store(staging + staged<TILE_N>(16 * i + 8 * half + lane / 4, col + 8 * j + lane % 4 * 2),
                              Vector<float, 2>{{sums[i][j][2 * half], sums[i][j][2 * half + 1]}});
    }
    __syncthreads();
    linear_finish_tile<T, 16 * ROWS, TILE_N, THREADS>(e, m + pass * 16 * ROWS, n, split, staging);
  }
}

// output = activation(Σ partial[split] + bias), the splits in their order. One thread, one output: the sums come from
// L2.
template <class T>
__global__ void __launch_bounds__(256) linear_reduce_kernel(LinearEpilogue e, int splits) {
  using C = Compute<T>;
  const int64_t total = e.M * e.N, at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= total) return;
  const C* partial = static_cast<const C*>(e.partial) + at;
  Vector<C, 1> sum{};
  for (int split = 0; split < splits; ++split, partial += total) sum.data[0] += *partial;
  e.vector = false;
  linear_finish<T, 1>(e, at / e.N, at % e.N, 1, sum);
}

}  // namespace fastnn::cuda

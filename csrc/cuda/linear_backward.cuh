// The pointwise part of linear's backward: g = grad_output ⊙ f'(saved), and db, the column sums of g. The products
// dX = g W and dW = gᵀ X are those of the forward's kernels on other strides.
//
// One pass: a block has 32 vectors of 16 bytes of columns and a run of rows, eight at a time; it stores g in the dtype
// of the tensors, which is what the tensor cores multiply, and leaves its column sums, from before that rounding, in
// the workspace. linear_column_sums_kernel adds those of the runs in their order. How long a run is depends on M alone.
//
// Bound by memory: two tensors read, one written. No figure: not yet measured on a GPU.
#pragma once

#include "cuda/linear_epilogue.cuh"

namespace fastnn::cuda {

struct LinearGrad {
  const void* grad_output;  // [M, N], element (m, n) at m * row + n * col
  int64_t row, col;
  const void* saved;  // [M, N], row stride N, or nullptr without an activation
  void* grad;         // [M, N], row stride N, or nullptr where only the sums are wanted
  void* sums;         // [runs, N] of the compute type, or nullptr
  int64_t M, N, run;  // rows of a run
  Activation activation;
  bool vector;  // 16 bytes at once in all three
};

template <class T>
inline constexpr int kGradColumns = 32 * kLanes<T>;

template <class T>
__global__ void __launch_bounds__(256) linear_grad_kernel(__grid_constant__ const LinearGrad p) {
  using C = Compute<T>;
  constexpr int W = kLanes<T>, L = kLanes<C>;
  const int tx = static_cast<int>(threadIdx.x) % 32, ty = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = int64_t{blockIdx.x} * kGradColumns<T>, n = first + tx * W;
  const int64_t begin = blockIdx.y * p.run, end = begin + p.run < p.M ? begin + p.run : p.M;
  const int count = n >= p.N ? 0 : static_cast<int>(p.N - n < W ? p.N - n : W);
  const T *const grad_output = static_cast<const T*>(p.grad_output), *const saved = static_cast<const T*>(p.saved);
  C sums[W] = {};
  for (int64_t m = begin + ty; m < end; m += 8) {
    Vector<T, W> g{}, s{};
    if (p.vector && count == W) {
      g = *reinterpret_cast<const Vector<T, W>*>(grad_output + m * p.row + n);
      if (saved) s = *reinterpret_cast<const Vector<T, W>*>(saved + m * p.N + n);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i < count) {
          g.data[i] = grad_output[m * p.row + (n + i) * p.col];
          if (saved) s.data[i] = saved[m * p.N + n + i];
        }
    }
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const C value = activate_backward(p.activation, C(widen(g.data[i])), C(widen(s.data[i])));
      if (i < count) sums[i] += value;
      g.data[i] = narrow<T>(value);
    }
    if (p.grad) store_row(static_cast<T*>(p.grad) + m * p.N + n, g, count, p.vector);
  }
  if (!p.sums) return;
  C* const shared = reinterpret_cast<C*>(ptx::dynamic_shared());  // [8, kGradColumns]
#pragma unroll
  for (int i = 0; i < W; i += L) {
    Vector<C, L> part;
#pragma unroll
    for (int j = 0; j < L; ++j) part.data[j] = sums[i + j];
    ptx::shared_store(shared + ty * kGradColumns<T> + tx * W + i, part);
  }
  __syncthreads();
  const int col = static_cast<int>(threadIdx.x);
  if (col >= kGradColumns<T> || first + col >= p.N) return;
  C sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += ptx::shared_load<C>(shared + i * kGradColumns<T> + col);
  static_cast<C*>(p.sums)[blockIdx.y * p.N + first + col] = sum;
}

// grad_bias[n] = Σ sums[run, n], the runs in their order.
template <class T>
__global__ void __launch_bounds__(256)
    linear_column_sums_kernel(const Compute<T>* sums, T* grad_bias, int64_t N, int64_t runs) {
  const int64_t n = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (n >= N) return;
  Compute<T> sum = 0;
  for (int64_t run = 0; run < runs; ++run) sum += sums[run * N + n];
  grad_bias[n] = narrow<T>(sum);
}

}  // namespace fastnn::cuda

// Gradients of linear on the CPU. With g = grad_output ⊙ f'(saved):  dX = g W,  dW = gᵀ X,  db = column sums of g.
//
// With an activation the rows go in blocks of 256: g of a block is made once, in compute type, together
// with its column sums, and both products read it from cache. Nothing of grad_output's size is kept; W is packed once
// for all blocks (in 16-bit dtypes the sums of dW take its place). Without an activation g is grad_output as it lies,
// and the driver of gemm.inl does the blocking.
//
// Few rows: thin.inl, bound by memory.
//
// Sums run over rows in blocks whose sizes depend on the shape alone: the same result for every number of threads.
#pragma once

#include "cpu/linear_store.inl"
#include "cpu/thin.inl"
#include "fastnn/linear.h"

namespace fastnn::cpu::FASTNN_ISA {

inline constexpr int64_t kRowsAtOnce = 256;

// to[i] += from[i * stride]
template <class C, class T>
void add_row(C* to, const T* from, int64_t stride, int64_t count) {
  constexpr int64_t L = kLanes<C>;
  int64_t i = 0;
  if (stride == 1)
    for (; i + L <= count; i += L) store(to + i, load(to + i) + load(from + i));
  for (; i < count; ++i) to[i] += load_one(from + i * stride);
}

// Calls add(m, sums) for every row m, on all threads; sums is [N], shared by a block of rows, and null where `total` is.
// The blocks depend on the shape alone and are added up in their order: total[n] += Σ sums[n].
template <class C, class F>
void sum_blocks(int64_t M, int64_t N, int threads, double flops, C* total, const F& add) {
  const int64_t size = std::max<int64_t>((M + 63) / 64, 4), blocks = (M + size - 1) / size;
  Scratch<C> sums(total ? blocks * N : 0);
  parallel(worth_threads(threads, flops, 1.0 * sizeof(C) * M * N), [&](int thread, int running) {
    const Range mine = share(blocks, 1, thread, running);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      C* const row = total ? sums + block * N : nullptr;
      if (row) std::fill_n(row, N, C(0));
      for (int64_t m = block * size; m < std::min((block + 1) * size, M); ++m) add(m, row);
    }
  });
  for (int64_t block = 0; total && block < blocks; ++block) add_row(total, sums + block * N, 1, N);
}

// ---- few rows ------------------------------------------------------------------------------------------------------

template <class T>
bool linear_backward_is_thin(const LinearBackward& p) {
  return p.M >= 1 && p.M <= kThinRows && p.N > 0 && p.K >= kLanes<Compute<T>> && (p.weight_col == 1 || !p.grad_input);
}

template <class T>
void linear_backward_thin(const LinearBackward& p) {
  using C = Compute<T>;
  Scratch<C> g(p.M * p.N), x(p.grad_weight ? p.M * p.K : 0);
  const T* grad = static_cast<const T*>(p.grad_output);
  if (p.activation == Activation::None)
    copy_rows(p.M, p.N, grad, p.grad_row, p.grad_col, g.data());
  else
    for (int64_t m = 0; m < p.M; ++m)
      activate_backward_row(p.activation, grad + m * p.grad_row, static_cast<const T*>(p.saved) + m * p.N, g + m * p.N,
                            p.N);
  if (p.grad_bias)
    for (int64_t n = 0; n < p.N; ++n) {
      C sum = 0;
      for (int64_t m = 0; m < p.M; ++m) sum += g[m * p.N + n];
      store_one(static_cast<T*>(p.grad_bias) + n, sum);
    }
  if (p.grad_weight) copy_rows(p.M, p.K, static_cast<const T*>(p.input), p.input_row, p.input_col, x.data());
  parallel(worth_threads(p.threads, 4.0 * p.M * p.N * p.K, 2.0 * sizeof(T) * p.N * p.K), [&](int thread, int running) {
    with_thin_rows(p.M, [&](auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      Range k = share(p.K / 64 * 64, 64, thread, running);
      if (thread == running - 1) k.end = p.K;  // so that no range is shorter than a vector
      const Range n = share(p.N, 1, thread, running);
      const C* x_rows[ROWS];
      for (int m = 0; m < ROWS; ++m) x_rows[m] = x + m * p.K;
      if (p.grad_input && k.begin < k.end)
        thin_grad_input<ROWS>(p.N, k.begin, k.end, g.data(), p.N, static_cast<const T*>(p.weight), p.weight_row,
                              static_cast<T*>(p.grad_input), p.K, false);
      if (p.grad_weight)
        thin_grad_weight<ROWS>(p.N, p.K, n.begin, n.end, g.data(), p.N, x_rows, static_cast<T*>(p.grad_weight));
    });
  });
}

// ---- many rows -----------------------------------------------------------------------------------------------------

// dX and dW of grad_output as it lies: no activation.
template <class T>
void linear_backward_plain(const LinearBackward& p) {
  using C = Compute<T>;
  const T* g = static_cast<const T*>(p.grad_output);
  if (p.grad_bias) {
    Scratch<C> total(p.N);
    std::fill_n(total.data(), p.N, C(0));
    sum_blocks(p.M, p.N, p.threads, 0, total.data(),
               [&](int64_t m, C* sums) { add_row(sums, g + m * p.grad_row, p.grad_col, p.N); });
    copy_rows(1, p.N, total.data(), p.N, 1, static_cast<T*>(p.grad_bias));
  }
  if (p.grad_input)
    gemm<C>(p.M, p.K, p.N, StridedA<C, T>{g, p.grad_row, p.grad_col},
            StridedB<C, T>{static_cast<const T*>(p.weight), p.weight_row, p.weight_col},
            RowMajorStore<T, C>{static_cast<T*>(p.grad_input), p.K, nullptr, Activation::None, nullptr}, p.threads);
  if (p.grad_weight)
    gemm<C>(p.N, p.K, p.M, StridedA<C, T>{g, p.grad_col, p.grad_row},
            StridedB<C, T>{static_cast<const T*>(p.input), p.input_row, p.input_col},
            RowMajorStore<T, C>{static_cast<T*>(p.grad_weight), p.K, nullptr, Activation::None, nullptr}, p.threads);
}

template <class T>
void linear_backward_derived(const LinearBackward& p) {
  using C = Compute<T>;
  const T *grad = static_cast<const T*>(p.grad_output), *saved = static_cast<const T*>(p.saved);
  const int64_t MB = std::max<int64_t>(even_block(p.M, kRowsAtOnce), 1);
  const bool blocks = p.M > MB, sums_in_scratch = blocks && !std::is_same_v<T, C>;
  Scratch<C> g(MB * p.N), bias(p.grad_bias ? p.N : 0);
  const bool pack = blocks && p.grad_input && !sums_in_scratch;  // one matrix of the weight's size is enough
  Scratch<C> packed(pack ? PackedB<C>::size(p.K, p.N) : 0);
  Scratch<C> weight_sums(sums_in_scratch && p.grad_weight ? p.N * p.K : 0);
  const StridedB<C, T> weight{static_cast<const T*>(p.weight), p.weight_row, p.weight_col};
  if (pack) pack_all<C>(weight, p.K, p.N, packed.data(), p.threads);
  if (p.grad_bias) std::fill_n(bias.data(), p.N, C(0));

  int64_t m0 = 0;
  do {  // once even for M = 0: gradients of an empty batch are zero
    const int64_t rows = std::min(MB, p.M - m0);
    sum_blocks(rows, p.N, p.threads, 20.0 * rows * p.N, bias.data(), [&](int64_t m, C* sums) {
      C* const row = g + m * p.N;
      activate_backward_row(p.activation, grad + (m0 + m) * p.grad_row, saved + (m0 + m) * p.N, row, p.N);
      if (sums) add_row(sums, row, 1, p.N);
    });
    if (p.grad_input) {
      const StridedA<C, C> a{g, p.N, 1};
      const RowMajorStore<T, C> to{static_cast<T*>(p.grad_input) + m0 * p.K, p.K, nullptr, Activation::None, nullptr};
      if (pack)
        gemm<C>(rows, p.K, p.N, a, PackedB<C>{packed, p.K, p.N}, to, p.threads);
      else
        gemm<C>(rows, p.K, p.N, a, weight, to, p.threads);
    }
    if (p.grad_weight) {
      const StridedA<C, C> a{g, 1, p.N};
      const StridedB<C, T> b{static_cast<const T*>(p.input) + m0 * p.input_row, p.input_row, p.input_col};
      if (sums_in_scratch)
        gemm<C>(p.N, p.K, rows, a, b, RowMajorStore<C, C>{weight_sums, p.K, nullptr, Activation::None, nullptr},
                p.threads, m0 > 0);
      else
        gemm<C>(p.N, p.K, rows, a, b,
                RowMajorStore<T, C>{static_cast<T*>(p.grad_weight), p.K, nullptr, Activation::None, nullptr}, p.threads,
                m0 > 0);
    }
    m0 += MB;
  } while (m0 < p.M);
  if (p.grad_bias) copy_rows(1, p.N, bias.data(), p.N, 1, static_cast<T*>(p.grad_bias));
  if (sums_in_scratch && p.grad_weight)
    parallel(worth_threads(p.threads, 0, 1.0 * sizeof(C) * p.N * p.K), [&](int thread, int running) {
      const Range n = share(p.N, 1, thread, running);
      copy_rows(n.end - n.begin, p.K, weight_sums + n.begin * p.K, p.K, 1,
                static_cast<T*>(p.grad_weight) + n.begin * p.K);
    });
}

template <class T>
void linear_backward_typed(const LinearBackward& p) {
  if (linear_backward_is_thin<T>(p)) return linear_backward_thin<T>(p);
  if (p.activation == Activation::None) return linear_backward_plain<T>(p);
  linear_backward_derived<T>(p);
}

}  // namespace fastnn::cpu::FASTNN_ISA

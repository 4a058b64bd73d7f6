// linear on the CPU: Y = f(X Wᵀ + b), its gradients, and the packing of a frozen weight.
//
// Four ways, chosen by shape and strides alone (linear_algorithm), never by the number of threads:
//   dot     few rows or few outputs: tiles of dot products along K straight on X and W, nothing packed. W is read once,
//           so for a batch of one it is bound by memory.
//   stream  few rows and W[n, k] with its outputs next to each other: linear_stream.inl, bound by memory.
//   packed  frozen weight: panels made before, the GEMM driver without its B packing.
//   gemm    the GEMM driver of gemm.inl, W packed panel by panel inside the call. Bound by the FMA units.
// Bias, activation and conversion happen on the tile, in registers or L1, before the one store.
#pragma once

#include "cpu/linear_backward.inl"
#include "cpu/linear_kernels.h"
#include "cpu/linear_store.inl"
#include "cpu/linear_stream.inl"

namespace fastnn::cpu::FASTNN_ISA {

// ---- dot -----------------------------------------------------------------------------------------------------------

// Half of two vectors of consecutive elements. bfloat16 gives its even lanes, then its odd ones: a shift or a mask, where
// elements in order take a shuffle too. Operands that were widened before lie in that order (widen_rows).
template <int HALF>
FASTNN_INLINE Vec<float> load_half(const BFloat16* p) {
  Vec<uint32_t> both;
  __builtin_memcpy(&both, p, sizeof both);
  return bitcast<Vec<float>>(HALF ? both & 0xffff0000u : both << 16);
}
template <int HALF, class T>
FASTNN_INLINE Vec<Compute<T>> load_half(const T* p) {
  return load(p + HALF * kLanes<Compute<T>>);
}

// sums[i * ld + j * apart] = x[i] · w[j] over K, a ROWS x COLS tile of accumulators along K.
template <int ROWS, int COLS, class TX, class T>
FASTNN_INLINE void dot_tile(int64_t K, const TX* x, int64_t x_row, const T* w, int64_t w_row, Compute<T>* sums,
                            int64_t ld, int64_t apart) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  Vec<C> acc[ROWS][COLS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < COLS; ++j) acc[i][j] = zero<C>();
  const auto step = [&](int64_t k, auto get) __attribute__((always_inline)) {
    Vec<C> xs[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) xs[i] = get(x + i * x_row + k);
#pragma GCC unroll 16
    for (int j = 0; j < COLS; ++j) {
      const Vec<C> v = get(w + j * w_row + k);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) acc[i][j] = fma(xs[i], v, acc[i][j]);
    }
  };
  int64_t k = 0;
  if constexpr (std::is_same_v<T, BFloat16>)
    for (; k + 2 * L <= K; k += 2 * L) {
      step(k, [](const auto* p) __attribute__((always_inline)) { return load_half<0>(p); });
      step(k, [](const auto* p) __attribute__((always_inline)) { return load_half<1>(p); });
    }
  for (; k + L <= K; k += L) step(k, [](const auto* p) __attribute__((always_inline)) { return load(p); });
  if (k < K) step(k, [=](const auto* p) __attribute__((always_inline)) { return load_first(p, K - k); });
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < COLS; ++j) sums[i * ld + j * apart] = reduce_add<C>(acc[i][j]);
}

inline constexpr int64_t kDotRows = 16, kDotCols = 64;  // the block of outputs whose sums wait in L1

// A block of at most kDotRows x kDotCols dot products. A tile's columns are not neighbours but lie `apart`: each reads on
// where it ended in the tile before, so that W comes as a few long streams, which the prefetchers follow. (A tile of
// neighbours starts new streams at each row; 1x384 -> 51865 took 1.7 times as long.) The tile depends on the rows
// alone, so that an output's order of summation does not depend on which thread has its column: along K each
// accumulator runs the same way in all tiles.
template <class TX, class T>
void dot_block(int64_t rows, int64_t cols, int64_t K, const TX* x, int64_t x_row, const T* w, int64_t w_row,
               Compute<T>* sums) {
  // Columns at a time: their rows of W stay in L2 for the next rows of X. A multiple of every tile's width.
  const int64_t most =
      rows <= 4 ? cols : std::max<int64_t>(131072 / (std::max<int64_t>(K, 1) * sizeof(T)) / 12 * 12, 12);
  for (int64_t begin = 0; begin < cols; begin += most) {
    const int64_t end = std::min(begin + most, cols);
    for (int64_t i = 0, tiles = (rows + 3) / 4, tile = 0; tile < tiles; ++tile) {
      const int64_t height = rows * (tile + 1) / tiles - i;
      const auto sweep = [&](auto H, auto W) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(H)::value, COLS = decltype(W)::value;
        const int64_t apart = (end - begin) / COLS;
        for (int64_t j = begin; j < begin + apart; ++j)
          dot_tile<ROWS, COLS>(K, x + i * x_row, x_row, w + j * w_row, apart * w_row, sums + i * kDotCols + j, kDotCols,
                               apart);
        for (int64_t j = begin + apart * COLS; j < end; ++j)
          dot_tile<ROWS, 1>(K, x + i * x_row, x_row, w + j * w_row, w_row, sums + i * kDotCols + j, kDotCols, 1);
      };
      switch (height) {
        case 1: sweep(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{}); break;
        case 2: sweep(std::integral_constant<int, 2>{}, std::integral_constant<int, 6>{}); break;
        case 3: sweep(std::integral_constant<int, 3>{}, std::integral_constant<int, 4>{}); break;
        default: sweep(std::integral_constant<int, 4>{}, std::integral_constant<int, 3>{});
      }
      i += height;
    }
  }
}

template <class T, class C>
void widen_rows(const T* src, int64_t row_stride, int64_t rows, int64_t K, C* dst) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t i = 0; i < rows; ++i, src += row_stride, dst += K) {
    int64_t k = 0;
    if constexpr (std::is_same_v<T, BFloat16>)
      for (; k + 2 * L <= K; k += 2 * L) {
        store(dst + k, load_half<0>(src + k));
        store(dst + k + L, load_half<1>(src + k));
      }
    for (; k + L <= K; k += L) store(dst + k, load(src + k));
    for (; k < K; ++k) dst[k] = load_one(src + k);
  }
}

template <class T, class C>
void linear_dot(const LinearForward& p, const RowMajorStore<T, C>& store_to) {
  if (p.N == 1 && p.M > 1) {  // one output: a row of M outputs instead, with the operands in each other's place
    LinearForward q = p;
    std::swap(q.M, q.N);
    std::swap(q.input, q.weight);
    std::swap(q.input_row, q.weight_row);
    Scratch<T> bias(p.bias ? p.M : 0);
    if (p.bias) std::fill_n(bias.data(), p.M, *static_cast<const T*>(p.bias));
    return linear_dot<T, C>(q, {store_to.output, p.M, bias, p.activation, store_to.preactivation});
  }
  const T *x = static_cast<const T*>(p.input), *w = static_cast<const T*>(p.weight);
  const int threads = worth_threads(p.threads, 2.0 * p.M * p.N * p.K, 1.0 * sizeof(T) * (p.M + p.N) * p.K);
  const int64_t row_blocks = (p.M + kDotRows - 1) / kDotRows, col_blocks = (p.N + kDotCols - 1) / kDotCols;
  // 16-bit operands are widened once where they are read more than once, not at each load of the inner loop: the rows of
  // X for all columns of a block, those of W where the block has more than one tile of rows.
  const bool widen_x = !std::is_same_v<T, C> && p.N > 4 && p.M > 1, widen_w = widen_x && p.M > 4;
  parallel(threads, [&](int thread, int running) {
    Scratch<C> wide_x(widen_x ? std::min(kDotRows, p.M) * p.K : 0), wide_w(widen_w ? std::min(kDotCols, p.N) * p.K : 0);
    int64_t widened_m = -1, widened_n = -1;
    const Range blocks = share(row_blocks * col_blocks, 1, thread, running);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t m = block / col_blocks * kDotRows, n = block % col_blocks * kDotCols;
      const int64_t rows = std::min(kDotRows, p.M - m), cols = std::min(kDotCols, p.N - n);
      const T *x_block = x + m * p.input_row, *w_block = w + n * p.weight_row;
      alignas(64) C sums[kDotRows * kDotCols];
      if (widen_x && std::exchange(widened_m, m) != m) widen_rows(x_block, p.input_row, rows, p.K, wide_x.data());
      if (widen_w && std::exchange(widened_n, n) != n) widen_rows(w_block, p.weight_row, cols, p.K, wide_w.data());
      if (widen_w) {
        dot_block(rows, cols, p.K, wide_x.data(), p.K, wide_w.data(), p.K, sums);
      } else if (widen_x) {
        dot_block(rows, cols, p.K, wide_x.data(), p.K, w_block, p.weight_row, sums);
      } else {
        dot_block(rows, cols, p.K, x_block, p.input_row, w_block, p.weight_row, sums);
      }
      constexpr int64_t L = kLanes<C>;
      for (int64_t i = 0; i < rows; ++i)  // lanes past the last column go through the activation: make them numbers
        for (int64_t j = cols; j < (cols + L - 1) / L * L; ++j) sums[i * kDotCols + j] = C(0);
      store_to.finish_rows(m, rows, n, cols, sums, kDotCols);
    }
  });
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
void linear_forward_typed(const LinearForward& p) {
  using C = Compute<T>;
  const T *input = static_cast<const T*>(p.input), *weight = static_cast<const T*>(p.weight);
  const RowMajorStore<T, C> store_to{static_cast<T*>(p.output), p.N, static_cast<const T*>(p.bias), p.activation,
                                     static_cast<T*>(p.preactivation)};
  const StridedA<C, T> a{input, p.input_row, p.input_col};
  switch (p.algorithm) {
    case LinearAlgorithm::Dot: return linear_dot<T, C>(p, store_to);
    case LinearAlgorithm::Stream: return linear_stream<T, C>(p, store_to);
    case LinearAlgorithm::Packed:
      return gemm<C>(p.M, p.N, p.K, a, PackedB<C>{static_cast<const C*>(p.packed), p.N, p.K}, store_to, p.threads);
    case LinearAlgorithm::Gemm:
      return gemm<C>(p.M, p.N, p.K, a, StridedB<C, T>{weight, p.weight_col, p.weight_row}, store_to, p.threads);
  }
}

// ---- table ---------------------------------------------------------------------------------------------------------

template <class F>
FASTNN_INLINE void with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32: return f(float{});
    case DType::Float64: return f(double{});
    case DType::BFloat16: return f(BFloat16{});
    case DType::Float16: return f(Float16{});
  }
}

inline void linear_forward_isa(const LinearForward& p) {
  with_storage(p.dtype, [&](auto t) { linear_forward_typed<decltype(t)>(p); });
}
inline void linear_backward_isa(const LinearBackward& p) {
  with_storage(p.dtype, [&](auto t) { linear_backward_typed<decltype(t)>(p); });
}
inline int64_t linear_packed_size_isa(DType dtype, int64_t N, int64_t K) {
  return dtype == DType::Float64 ? PackedB<double>::size(N, K) : PackedB<float>::size(N, K);
}
inline void linear_pack_isa(const LinearPack& p) {
  with_storage(p.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    pack_all<C>(StridedB<C, T>{static_cast<const T*>(p.weight), p.weight_col, p.weight_row}, p.N, p.K,
                static_cast<C*>(p.packed), p.threads);
  });
}

inline constexpr LinearKernels linear_kernels = {linear_forward_isa, linear_backward_isa, linear_packed_size_isa,
                                                 linear_pack_isa};

}  // namespace fastnn::cpu::FASTNN_ISA

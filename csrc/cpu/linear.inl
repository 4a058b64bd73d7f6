// linear on the CPU: Y = f(X Wᵀ + b), its gradients, and the packing of a frozen weight.
//
// Three ways, chosen by shape and strides alone (linear_algorithm), never by the number of threads:
//   dot     few rows or few outputs: tiles of dot products along K straight on X and W, nothing packed. W is read once,
//           so for a batch of one it is bound by memory.
//   packed  frozen weight: panels made before, the GEMM driver without its B packing.
//   gemm    the GEMM driver of gemm.inl, W packed panel by panel inside the call. Bound by the FMA units.
// Bias, activation and conversion happen on the tile, in registers or L1, before the one store.
//
// Backward: g = grad ⊙ f'(saved) once, then dX = g W and dW = gᵀ X on the same driver, db = column sums of g.
#pragma once

#include "cpu/activation.inl"
#include "cpu/gemm.inl"
#include "cpu/linear_kernels.h"
#include "fastnn/linear.h"

namespace fastnn::cpu::FASTNN_ISA {

// The tile's way out, for any op whose C is a row-major matrix with a bias for each column.
template <class T, class C>
struct RowMajorStore {
  T* output;
  int64_t ld;  // row stride of output and preactivation
  const T* bias;
  Activation activation;
  T* preactivation;

  C* in_place(int64_t m, int64_t n, int64_t& stride) const {
    if constexpr (!std::is_same_v<T, C>) return nullptr;
    stride = ld;
    return reinterpret_cast<C*>(output) + m * ld + n;
  }

  template <int ROWS>
  FASTNN_INLINE bool direct(const TilePlace<C>& place, Tile<C, ROWS>& tile) const {
    constexpr int L = kLanes<C>;
    if (preactivation || (activation != Activation::None && activation != Activation::Relu)) return false;
    const Vec<C> b0 = bias ? load(bias + place.n) : zero<C>(), b1 = bias ? load(bias + place.n + L) : zero<C>();
    const bool relu = activation == Activation::Relu;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i >= place.rows) break;
      Vec<C> y0 = tile.acc[i][0] + b0, y1 = tile.acc[i][1] + b1;
      if (relu) y0 = activate<Activation::Relu, C>(y0), y1 = activate<Activation::Relu, C>(y1);
      T* row = output + (place.m + i) * ld + place.n;
      store(row, y0);
      store(row + L, y1);
    }
    return true;
  }

  __attribute__((noinline)) void finish(const TilePlace<C>& place, C* tile) const {
    finish_rows(place.m, place.rows, place.n, place.cols, tile, kNR<C>);
  }

  // tile[i * width + j], j < cols <= width, width a whole number of vectors.
  void finish_rows(int64_t m, int64_t rows, int64_t n, int64_t cols, C* tile, int64_t width) const {
    constexpr int L = kLanes<C>;
    for (int64_t j = 0; j < cols; j += L) {
      if (bias) {
        const Vec<C> b = load_first(bias + n + j, cols - j);
        for (int64_t i = 0; i < rows; ++i) store(tile + i * width + j, load(tile + i * width + j) + b);
      }
      if (preactivation)
        for (int64_t i = 0; i < rows; ++i)
          store_first(preactivation + (m + i) * ld + n + j, load(tile + i * width + j), cols - j);
    }
    if (activation != Activation::None) activate_in_place(activation, tile, rows * width);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; j += L)
        store_first(output + (m + i) * ld + n + j, load(tile + i * width + j), cols - j);
  }
};

// ---- dot -----------------------------------------------------------------------------------------------------------

// sums[i * ld + j] = x[i] · w[j] over K, a ROWS x COLS tile of accumulators along K.
template <int ROWS, int COLS, class TX, class T>
FASTNN_INLINE void dot_tile(int64_t K, const TX* x, int64_t x_row, const T* w, int64_t w_row, Compute<T>* sums,
                            int64_t ld) {
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
  for (; k + L <= K; k += L) step(k, [](const auto* p) __attribute__((always_inline)) { return load(p); });
  if (k < K) step(k, [=](const auto* p) __attribute__((always_inline)) { return load_first(p, K - k); });
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < COLS; ++j) sums[i * ld + j] = reduce_add<C>(acc[i][j]);
}

inline constexpr int64_t kDotRows = 16, kDotCols = 64;  // the block of outputs whose sums wait in L1

// A block of at most kDotRows x kDotCols dot products. The tile depends on the rows alone, so that an output's order of
// summation does not depend on which thread has its column: along K each accumulator runs the same way in all tiles.
template <class TX, class T>
void dot_block(int64_t rows, int64_t cols, int64_t K, const TX* x, int64_t x_row, const T* w, int64_t w_row,
               Compute<T>* sums) {
  const auto sweep = [&](auto height, auto width, int64_t i) __attribute__((always_inline)) {
    constexpr int R = decltype(height)::value, W = decltype(width)::value;
    int64_t j = 0;
    for (; j + W <= cols; j += W)
      dot_tile<R, W>(K, x + i * x_row, x_row, w + j * w_row, w_row, sums + i * kDotCols + j, kDotCols);
    for (; j < cols; ++j)
      dot_tile<R, 1>(K, x + i * x_row, x_row, w + j * w_row, w_row, sums + i * kDotCols + j, kDotCols);
  };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) sweep(std::integral_constant<int, 4>{}, std::integral_constant<int, 3>{}, i);
  if (rows - i == 3) sweep(std::integral_constant<int, 3>{}, std::integral_constant<int, 4>{}, i);
  if (rows - i == 2) sweep(std::integral_constant<int, 2>{}, std::integral_constant<int, 4>{}, i);
  if (rows - i == 1) sweep(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{}, i);
}

template <class T, class C>
void widen_rows(const T* src, int64_t row_stride, int64_t rows, int64_t K, C* dst) {
  for (int64_t i = 0; i < rows; ++i, src += row_stride, dst += K) {
    int64_t k = 0;
    for (; k + kLanes<C> <= K; k += kLanes<C>) store(dst + k, load(src + k));
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
      for (int64_t i = 0; i < rows; ++i)
        store_to.finish_rows(m + i, 1, n, cols, sums + i * kDotCols, (cols + L - 1) / L * L);
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
  switch (linear_algorithm(p)) {
    case LinearAlgorithm::Dot: return linear_dot<T, C>(p, store_to);
    case LinearAlgorithm::Packed:
      return gemm<C>(p.M, p.N, p.K, a, PackedB<C>{static_cast<const C*>(p.packed), p.N, p.K}, store_to, p.threads);
    case LinearAlgorithm::Gemm:
      return gemm<C>(p.M, p.N, p.K, a, StridedB<C, T>{weight, p.weight_col, p.weight_row}, store_to, p.threads);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// db[n] = sum over m of g[m, n]: whole columns to a thread, rows in blocks so that rounding grows with their number only.
template <class T>
void column_sums(const T* g, int64_t row, int64_t col, int64_t M, int64_t N, T* sums, int threads) {
  using C = Compute<T>;
  constexpr int64_t L = kLanes<C>, kBlock = 128;
  parallel(worth_threads(threads, 0, 1.0 * M * N * sizeof(T)), [&](int thread, int running) {
    const Range columns = share(N, L, thread, running);
    for (int64_t n = columns.begin; n < columns.end; n += L) {
      const int64_t count = std::min(L, columns.end - n);
      Vec<C> total = zero<C>();
      for (int64_t m0 = 0; m0 < M; m0 += kBlock) {
        Vec<C> part = zero<C>();
        for (int64_t m = m0; m < std::min(m0 + kBlock, M); ++m) {
          const T* p = g + m * row + n * col;
          if (col == 1) {
            part += load_first(p, count);
          } else {
            for (int64_t j = 0; j < count; ++j) part[j] += load_one(p + j * col);
          }
        }
        total += part;
      }
      store_first(sums + n, total, count);
    }
  });
}

// C = A B for at most MR rows, on B in place: its elements are used once a row, so packing would only add traffic.
template <class C>
void thin_product(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb, C* c, int64_t ldc,
                  int threads) {
  constexpr int64_t NR = kNR<C>, L = kLanes<C>;
  parallel(worth_threads(threads, 2.0 * M * N * K, 1.0 * sizeof(C) * N * K), [&](int thread, int running) {
    const Range columns = share(N, NR, thread, running);
    const int64_t KC = 256;
    Scratch<C> edge(KC * NR);
    for (int64_t n = columns.begin; n < columns.end; n += NR) {
      const int64_t cols = std::min(NR, columns.end - n);
      with_rows<C>(M, [&](auto height) {
        constexpr int ROWS = decltype(height)::value;
        Tile<C, ROWS> total = {};
        for (int64_t k = 0; k < K; k += KC) {
          const int64_t depth = std::min(KC, K - k);
          const C* panel = b + k * ldb + n;
          if (cols < NR) pack_panel<kNR<C>>(panel, 1, ldb, cols, depth, edge.data());
          Tile<C, ROWS> tile;
          micro_kernel_strided<C, ROWS>(depth, a + k, lda, cols < NR ? edge.data() : panel, cols < NR ? NR : ldb, tile);
          for (int i = 0; i < ROWS; ++i) total.acc[i][0] += tile.acc[i][0], total.acc[i][1] += tile.acc[i][1];
        }
        for (int64_t i = 0; i < M; ++i) {
          store_first(c + i * ldc + n, total.acc[i][0], cols);
          if (cols > L) store_first(c + i * ldc + n + L, total.acc[i][1], cols - L);
        }
      });
    }
  });
}

template <class T>
void linear_backward_typed(const LinearBackward& p) {
  using C = Compute<T>;
  const T *input = static_cast<const T*>(p.input), *weight = static_cast<const T*>(p.weight);
  const T* g = static_cast<const T*>(p.grad_output);
  int64_t g_row = p.grad_row, g_col = p.grad_col;
  Scratch<T> derived(p.activation == Activation::None ? 0 : p.M * p.N);
  if (p.activation != Activation::None) {
    const T* saved = static_cast<const T*>(p.saved);
    parallel(worth_threads(p.threads, 20.0 * p.M * p.N, 1.0 * p.M * p.N * sizeof(T)), [&](int thread, int running) {
      const Range rows = share(p.M, 1, thread, running);
      for (int64_t m = rows.begin; m < rows.end; ++m)
        activate_backward_row(p.activation, g + m * p.grad_row, saved + m * p.N, derived + m * p.N, p.N);
    });
    g = derived, g_row = p.N, g_col = 1;
  }
  if (p.grad_bias) column_sums(g, g_row, g_col, p.M, p.N, static_cast<T*>(p.grad_bias), p.threads);
  if (p.grad_input) {
    T* grad_input = static_cast<T*>(p.grad_input);
    bool done = false;
    if constexpr (std::is_same_v<T, C>) {
      // The rows that a tile height rounds up to must exist: heights are exact up to 2 everywhere.
      if (p.M > 0 && p.M <= 2 && g_col == 1 && p.weight_col == 1) {
        thin_product<C>(p.M, p.K, p.N, g, g_row, weight, p.weight_row, grad_input, p.K, p.threads);
        done = true;
      }
    }
    if (!done)
      gemm<C>(p.M, p.K, p.N, StridedA<C, T>{g, g_row, g_col}, StridedB<C, T>{weight, p.weight_row, p.weight_col},
              RowMajorStore<T, C>{grad_input, p.K, nullptr, Activation::None, nullptr}, p.threads);
  }
  if (p.grad_weight)
    gemm<C>(p.N, p.K, p.M, StridedA<C, T>{g, g_col, g_row}, StridedB<C, T>{input, p.input_row, p.input_col},
            RowMajorStore<T, C>{static_cast<T*>(p.grad_weight), p.K, nullptr, Activation::None, nullptr}, p.threads);
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
                static_cast<C*>(p.packed));
  });
}

inline constexpr LinearKernels linear_kernels = {linear_forward_isa, linear_backward_isa, linear_packed_size_isa,
                                                 linear_pack_isa};

}  // namespace fastnn::cpu::FASTNN_ISA

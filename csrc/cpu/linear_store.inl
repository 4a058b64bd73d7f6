// A finished tile's way to a row-major matrix: bias, pre-activation, activation, conversion, then the one store. And the
// copy of a strided matrix.
#pragma once

#include "cpu/activation.inl"
#include "cpu/gemm.inl"

namespace fastnn::cpu::FASTNN_ISA {

// A strided matrix made dense, from one type to another.
template <class T, class O>
void copy_rows(int64_t rows, int64_t cols, const T* from, int64_t row, int64_t col, O* to) {
  using C = Compute<T>;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t j = 0;
    if (col == 1)
      for (; j + kLanes<C> <= cols; j += kLanes<C>) store(to + i * cols + j, load(from + i * row + j));
    for (; j < cols; ++j) store_one(to + i * cols + j, load_one(from + i * row + j * col));
  }
}

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

  __attribute__((noinline)) void finish(const TilePlace<C>& place, const C* tile) const {
    finish_rows(place.m, place.rows, place.n, place.cols, tile, kNR<C>);
  }

  // tile[i * width + j], j < cols <= width, width a whole number of vectors: one pass, down the rows a vector at a time.
  void finish_rows(int64_t m, int64_t rows, int64_t n, int64_t cols, const C* tile, int64_t width) const {
    constexpr int64_t L = kLanes<C>;
    with_activation(activation, [=, this](auto a) {
      for (int64_t j = 0; j < cols; j += L) {
        const int64_t lanes = std::min(cols - j, L);
        const Vec<C> b = bias ? load_first(bias + n + j, lanes) : zero<C>();
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (m + i) * ld + n + j;
          const Vec<C> z = load(tile + i * width + j) + b;
          if (preactivation) store_first(preactivation + at, z, lanes);
          const Vec<C> y = activate<decltype(a)::value, C>(z);
          lanes == L ? store(output + at, y) : store_first(output + at, y, lanes);
        }
      }
    });
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA

// A finished tile's way to a row-major matrix: bias, pre-activation, activation, conversion, then the one store.
#pragma once

#include "cpu/activation.inl"
#include "cpu/gemm.inl"

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

}  // namespace fastnn::cpu::FASTNN_ISA

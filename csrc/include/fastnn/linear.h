// linear: output = activation(input @ weight.T + bias). The contract between the binding and the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastnn/cuda.h"
#include "fastnn/types.h"

namespace fastnn {

// Gemm: the weight is packed into panels in the call. Packed: it was before. Dot: dot products along K on the operands as
// they lie, nothing is packed. Stream: sums of rows of a weight whose outputs lie next to each other, nothing is packed.
enum class LinearAlgorithm : int32_t { Gemm, Dot, Packed, Stream };
inline constexpr const char* kLinearAlgorithmNames[] = {"gemm", "dot", "packed", "stream"};

// Cycles of one core, fitted to AVX2 (other widths scale all three alike). A panel of B serves rows in tiles of six, and a
// tile of fewer than four waits for its own multiply-adds. Each dot product is summed over its lanes at the end, and a
// last partial vector costs a masked load in each. A stream reads the weight once for eight rows of input (counted in parts:
// a step would bring it back for some more rows). Weights of more than a few MiB come from memory: rows as several
// streams; panels as one, asked for ahead, so that the arithmetic hides it or is hidden by it.
inline double linear_cost(LinearAlgorithm algorithm, DType dtype, int64_t M, int64_t N, int64_t K) {
  const int64_t lanes = dtype == DType::Float64 ? 4 : 8;
  const double panels = static_cast<double>((N + 2 * lanes - 1) / (2 * lanes));
  const double stored = dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2, packed = stored == 8 ? 8 : 4;
  const double elements = static_cast<double>(N) * K, m = static_cast<double>(M);
  const auto streamed = [&](double bytes, double cycles) { return elements * bytes > 4194304 ? cycles * bytes : 0; };
  if (algorithm == LinearAlgorithm::Dot) {
    const double blocks = static_cast<double>((M + 15) / 16), tail = K % lanes ? 14 : 0;
    const double widened = stored == 2 && M > 4 ? 0.5 : 0;  // rows of the weight, once a block
    return m * N * (1.05 * K / (2.0 * lanes) + 5 + tail) + blocks * elements * (streamed(stored, 0.13) + widened);
  }
  if (algorithm == LinearAlgorithm::Stream) {
    const double passes = std::max(m / 8, 1.0), widened = stored == 2 ? 0.06 : 0;
    return elements * (0.6 * (m + passes) / lanes + passes * (widened + streamed(stored, 0.1))) + 500;
  }
  const double tiles = static_cast<double>((M + 5) / 6), panel = std::max(m, 4 * tiles) * K + 40 * tiles;
  const double multiplied = panels * panel + 0.3 * m * K;
  if (algorithm == LinearAlgorithm::Gemm)
    return multiplied + elements * ((stored == 2 ? 0.9 : 0.3) + streamed(stored, 0.35));
  if (const double read = elements * streamed(packed, 0.2))
    return std::max(multiplied, read) + std::min(multiplied, read) / 8;
  return multiplied + 0.05 * elements;
}

// What can serve a problem: dot where the elements of a row of input and of weight lie next to each other, stream where
// those of a column of the weight do and there are as many as a vector of any ISA holds, packed where the weight is frozen.
struct LinearChoice {
  bool dot, stream, packed;
  bool fits(LinearAlgorithm a) const {
    return a == LinearAlgorithm::Dot      ? dot
           : a == LinearAlgorithm::Stream ? stream
           : a == LinearAlgorithm::Packed ? packed
                                          : true;
  }
};
inline LinearChoice linear_choice(int64_t N, int64_t K, int64_t input_col, int64_t weight_row, int64_t weight_col,
                                  bool frozen) {
  return {K == 1 || (input_col == 1 && weight_col == 1), weight_row == 1 && N >= 16, frozen};
}

// The rule that chooses, in one place; the number of threads has no say in it.
inline LinearAlgorithm linear_algorithm(DType dtype, int64_t M, int64_t N, int64_t K, LinearChoice choice) {
  LinearAlgorithm best = choice.packed ? LinearAlgorithm::Packed : LinearAlgorithm::Gemm;
  for (const LinearAlgorithm other : {LinearAlgorithm::Dot, LinearAlgorithm::Stream})
    if (choice.fits(other) && linear_cost(other, dtype, M, N, K) < linear_cost(best, dtype, M, N, K)) best = other;
  return best;
}

struct LinearForward {
  DType dtype;
  LinearAlgorithm algorithm;
  Activation activation;
  int64_t M, N, K;    // rows (product of the leading dimensions), out_features, in_features
  const void* input;  // [M, K], element (m, k) at m * input_row + k * input_col
  int64_t input_row, input_col;
  const void* weight;  // [N, K], element (n, k) at n * weight_row + k * weight_col
  int64_t weight_row, weight_col;
  const void* packed;   // weight as linear_pack left it, or nullptr
  const void* bias;     // [N], or nullptr
  void* output;         // [M, N], row stride N
  void* preactivation;  // [M, N], row stride N: input @ weight.T + bias, or nullptr where it is not wanted
  int threads;
  bool allow_tf32 = false;  // float32 on CUDA may round its operands to TF32
};

struct LinearBackward {
  DType dtype;
  Activation activation;
  int64_t M, N, K;
  const void* grad_output;  // [M, N], element (m, n) at m * grad_row + n * grad_col; grad_col is 1 with an activation
  int64_t grad_row, grad_col;
  const void* saved;  // [M, N], row stride N: the output or the pre-activation, as activation_from_output says
  const void* input;  // [M, K], strides as in LinearForward
  int64_t input_row, input_col;
  const void* weight;  // [N, K]
  int64_t weight_row, weight_col;
  void* grad_input;   // [M, K], row stride K, or nullptr where it is not wanted
  void* grad_weight;  // [N, K], row stride K, or nullptr
  void* grad_bias;    // [N], or nullptr
  int threads;
  bool allow_tf32 = false;  // as in LinearForward
};

struct LinearPack {
  DType dtype;
  int64_t N, K;
  const void* weight;  // [N, K]
  int64_t weight_row, weight_col;
  void* packed;  // panels of the compute type (float, or double for double); packed_size elements
  int threads;
};

namespace cpu {

void linear_forward(const LinearForward& p);
void linear_backward(const LinearBackward& p);
int64_t linear_packed_size(DType dtype, int64_t N, int64_t K);  // in elements of the compute type
void linear_pack(const LinearPack& p);

}  // namespace cpu

namespace cuda {

// `algorithm`, `packed` and `threads` are the CPU's, which in turn knows no `allow_tf32`.
Status linear_forward(const LinearForward& p, const Workspace& workspace, Stream stream);
Status linear_backward(const LinearBackward& p, const Workspace& workspace, Stream stream);

}  // namespace cuda
}  // namespace fastnn

// The table of linear kernels that each ISA's stub exports, and the choice between algorithms.
#pragma once

#include "fastnn/linear.h"

namespace fastnn::cpu {

struct LinearKernels {
  void (*forward)(const LinearForward&);
  void (*backward)(const LinearBackward&);
  int64_t (*packed_size)(DType, int64_t N, int64_t K);
  void (*pack)(const LinearPack&);
};

enum class LinearAlgorithm : int { Gemm, Dot, Packed };

// Dot products need rows of X and W that lie along K, and pay while one operand is too thin to repay packing the other:
// a weight packed for M rows costs about one cycle an element where M rows of arithmetic cost M / 16.
inline LinearAlgorithm linear_algorithm(const LinearForward& p) {
  const bool along_k = (p.input_col == 1 || p.K == 1) && (p.weight_col == 1 || p.K == 1);
  const bool thin = p.packed ? p.M <= 2 : p.M <= 4 || (p.M <= 16 && p.K >= 64) || p.N <= 4 || (p.N <= 12 && p.K >= 64);
  if (along_k && thin) return LinearAlgorithm::Dot;
  return p.packed ? LinearAlgorithm::Packed : LinearAlgorithm::Gemm;
}

}  // namespace fastnn::cpu

// linear: output = activation(input @ weight.T + bias). The contract between the binding and the kernels.
#pragma once

#include "fastnn/types.h"

namespace fastnn {

struct LinearForward {
  DType dtype;
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
}  // namespace fastnn

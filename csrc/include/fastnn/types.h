// What every operator's contract is written in: element types and activations. No torch, no intrinsics.
#pragma once

#include <cstdint>

namespace fastnn {

enum class DType : int32_t { Float32, Float64, BFloat16, Float16 };

// Storage types of 16 bits. Arithmetic happens in float; kernels convert on load and store.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// y = f(z). Formulas are those of torch with default parameters (leaky_relu slope 0.01, elu alpha 1).
enum class Activation : int32_t {
  None,
  Relu,
  Gelu,
  GeluTanh,
  Silu,
  Sigmoid,
  Tanh,
  LeakyRelu,
  Elu,
  Hardswish,
  Relu6,
  Softplus,
  Mish,
};

struct ActivationRow {
  const char* name;
  Activation activation;
  bool from_output;  // f'(z) can be had from y = f(z) alone, so training saves y and no pre-activation
};

inline constexpr ActivationRow kActivations[] = {
    {"relu", Activation::Relu, true},
    {"gelu", Activation::Gelu, false},
    {"gelu_tanh", Activation::GeluTanh, false},
    {"silu", Activation::Silu, false},
    {"sigmoid", Activation::Sigmoid, true},
    {"tanh", Activation::Tanh, true},
    {"leaky_relu", Activation::LeakyRelu, true},
    {"elu", Activation::Elu, true},
    {"hardswish", Activation::Hardswish, false},
    {"relu6", Activation::Relu6, true},
    {"softplus", Activation::Softplus, false},
    {"mish", Activation::Mish, false},
};

inline constexpr bool activation_from_output(Activation activation) {
  for (const ActivationRow& row : kActivations)
    if (row.activation == activation) return row.from_output;
  return true;
}

}  // namespace fastnn

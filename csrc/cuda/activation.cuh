// Every activation and its derivative, one value at a time.
//
// The elementary functions are those of CUDA's own library in full precision (no fast-math): expf, expm1f, tanhf, erff
// and log1pf are within 2 ulp, their double versions within 2 ulp too, as the CUDA programming guide tables them; so is
// the float division. The formulas are those of csrc/cpu/activation.inl. NaN goes in and comes out of every activation;
// relu(NaN) is NaN.
#pragma once

#include <cmath>

#include "cuda/ptx.cuh"

namespace fastnn::cuda {

FASTNN_DEVICE float exp_of(float x) { return ::expf(x); }
FASTNN_DEVICE double exp_of(double x) { return ::exp(x); }
FASTNN_DEVICE float expm1_of(float x) { return ::expm1f(x); }
FASTNN_DEVICE double expm1_of(double x) { return ::expm1(x); }
FASTNN_DEVICE float tanh_of(float x) { return ::tanhf(x); }
FASTNN_DEVICE double tanh_of(double x) { return ::tanh(x); }
FASTNN_DEVICE float erf_of(float x) { return ::erff(x); }
FASTNN_DEVICE double erf_of(double x) { return ::erf(x); }
FASTNN_DEVICE float log1p_of(float x) { return ::log1pf(x); }
FASTNN_DEVICE double log1p_of(double x) { return ::log1p(x); }

// With e = exp(-|x|), σ(x) is 1 / (1 + e) or e / (1 + e): nothing overflows.
template <class C>
FASTNN_DEVICE C sigmoid_of(C x) {
  const C e = exp_of(x < C(0) ? x : -x);
  return ptx::divide(x < C(0) ? e : C(1), C(1) + e);
}

// tanh(softplus(x)) without a logarithm: with e = exp(x), (e² + 2e) / (e² + 2e + 2).
template <class C>
FASTNN_DEVICE C tanh_softplus(C x) {
  const C e = exp_of(x > C(20) ? C(20) : x), q = e * (e + C(2));
  return ptx::divide(q, q + C(2));
}

// y = f(z).
template <class C>
FASTNN_DEVICE C activate(Activation activation, C z) {
  switch (activation) {
    case Activation::None: return z;
    case Activation::Relu: return z < C(0) ? C(0) : z;
    case Activation::Gelu: return z * C(0.5) * (erf_of(z * C(0.70710678118654752440)) + C(1));
    case Activation::GeluTanh:
      return z * C(0.5) * (tanh_of((z + z * z * z * C(0.044715)) * C(0.79788456080286535588)) + C(1));
    case Activation::Silu: {
      const C e = exp_of(z < C(0) ? z : -z);
      return ptx::divide(z < C(0) ? z * e : z, C(1) + e);
    }
    case Activation::Sigmoid: return sigmoid_of(z);
    case Activation::Tanh: return tanh_of(z);
    case Activation::LeakyRelu: return z > C(0) ? z : z * C(0.01);
    case Activation::Elu: return z > C(0) ? z : expm1_of(z);
    case Activation::Hardswish: {
      const C low = z + C(3) < C(0) ? C(0) : z + C(3);
      return z * ((low > C(6) ? C(6) : low) * C(1.0 / 6));
    }
    case Activation::Relu6: {
      const C low = z < C(0) ? C(0) : z;
      return low > C(6) ? C(6) : low;
    }
    case Activation::Softplus: return z > C(20) ? z : (z < C(0) ? C(0) : z) + log1p_of(exp_of(z < C(0) ? z : -z));
    case Activation::Mish: return z > C(20) ? z : z * tanh_softplus(z);
  }
  return z;
}

// g · f'(z), from `saved`: y = f(z) where activation_from_output(activation), else z.
template <class C>
FASTNN_DEVICE C activate_backward(Activation activation, C g, C s) {
  switch (activation) {
    case Activation::None: return g;
    case Activation::Relu: return s <= C(0) ? C(0) : g;
    case Activation::Gelu: {
      const C cdf = (erf_of(s * C(0.70710678118654752440)) + C(1)) * C(0.5);
      const C pdf = exp_of(s * s * C(-0.5)) * C(0.39894228040143267794);
      return g * (s * pdf + cdf);
    }
    case Activation::GeluTanh: {
      const C t = tanh_of((s + s * s * s * C(0.044715)) * C(0.79788456080286535588));
      const C inner = (s * s * C(3 * 0.044715) + C(1)) * C(0.79788456080286535588);
      return g * C(0.5) * ((t + C(1)) + s * (C(1) - t * t) * inner);
    }
    case Activation::Silu: {
      const C y = sigmoid_of(s);
      return g * y * (s * (C(1) - y) + C(1));
    }
    case Activation::Sigmoid: return g * s * (C(1) - s);
    case Activation::Tanh: return g * (C(1) - s * s);
    case Activation::LeakyRelu: return s > C(0) ? g : g * C(0.01);
    case Activation::Elu: return s > C(0) ? g : g * (s + C(1));
    case Activation::Hardswish: {
      const C inner = g * (s * C(1.0 / 3) + C(0.5));
      return s <= C(-3) ? C(0) : (s < C(3) ? inner : g);
    }
    case Activation::Relu6: return s <= C(0) || s >= C(6) ? C(0) : g;
    case Activation::Softplus: return s > C(20) ? g : g * sigmoid_of(s);
    case Activation::Mish: {
      const C t = tanh_softplus(s);
      return g * (s * sigmoid_of(s) * (C(1) - t * t) + t);
    }
  }
  return g;
}

}  // namespace fastnn::cuda

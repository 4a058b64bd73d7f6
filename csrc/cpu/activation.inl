// Elementary functions of a vector, and on them every activation and its derivative.
//
// float: polynomials of least error; against libm on four million points each they are off by at most 1.1 ulp
// (exp), 2.1 (exp2), 2.5 (tanh), 3.3 (sigmoid), 3.9 (erf) and 1.9 (log1p). Tests hold the activations to a relative
// 2e-6. double: libm lane by lane; it serves gradient checks, not speed.
// NaN goes in and comes out of every activation; relu(NaN) is NaN.
#pragma once

#include "cpu/vec.h"

namespace fastnn::cpu::FASTNN_ISA {

template <class C, class F>
FASTNN_INLINE Vec<C> lane_by_lane(Vec<C> x, const F& f) {
  alignas(64) C lanes[kLanes<C>];
  store(lanes, x);
  for (int i = 0; i < kLanes<C>; ++i) lanes[i] = f(lanes[i]);
  return load(lanes);
}

// The polynomial of these coefficients, by Estrin's scheme: a short chain of dependent steps, so that a few vectors fill
// the pipes.
template <class C, size_t N>
FASTNN_INLINE Vec<C> polynomial(Vec<C> x, const C (&coefficients)[N]) {
  Vec<C> y[N];
#pragma GCC unroll 16
  for (size_t i = 0; i < N; ++i) y[i] = splat<C>(coefficients[i]);
#pragma GCC unroll 4
  for (size_t count = N; count > 1; count = (count + 1) / 2, x = x * x)
#pragma GCC unroll 16
    for (size_t i = 0; i < (count + 1) / 2; ++i) y[i] = 2 * i + 1 < count ? fma(y[2 * i + 1], x, y[2 * i]) : y[2 * i];
  return y[0];
}

// 2^n for integers held in floats, n in [-126, 127].
FASTNN_INLINE Vec<float> power_of_two(Vec<int32_t> n) { return bitcast<Vec<float>>((n + 127) << 23); }

// e^r - 1 for |r| <= ln 2 / 2.
FASTNN_INLINE Vec<float> expm1_near_0(Vec<float> r) {
  constexpr float p[] = {0.4999999815f, 0.1666654349f, 0.04166720043f, 0.008366538711f, 0.001388251871f};
  return fma(polynomial(r, p), r * r, r);
}

FASTNN_INLINE Vec<float> vexp(Vec<float> x) {
  // Beyond these the result is 0 or infinity anyway; NaN passes both comparisons.
  x = x < -105.0f ? splat(-105.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Vec<float> whole = shifted - 12582912.0f;
  // x - n ln 2 in two parts; the first has few enough bits for the product to be exact.
  const Vec<float> r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), x));
  const Vec<int32_t> n = bitcast<Vec<int32_t>>(shifted) - bitcast<int32_t>(12582912.0f);
  const Vec<int32_t> half = n >> 1;  // in two steps, so that subnormal results and infinity come out right
  return (expm1_near_0(r) + 1.0f) * power_of_two(half) * power_of_two(n - half);
}

// 2^(n + r) for |r| <= 1/2, off by at most 2.1 ulp: a polynomial of relative error 1.1e-7, then rounding. `shifted` is n
// with the bias of the exponent and 1.5 · 2^23 added: its low bits are those of the exponent of 2^n; 0 of them make the
// factor 0.
inline constexpr float kExponentShift = 12582912.0f + 127.0f;
FASTNN_INLINE Vec<float> exp2_of(Vec<float> shifted, Vec<float> r) {
  constexpr float p[] = {0.00132647273f, 0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f};
  Vec<float> y = splat(p[0]);  // Horner's scheme: the calls of a loop overlap, and it has the fewest products
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) y = fma(y, r, splat(p[i]));
  return y * bitcast<Vec<float>>(bitcast<Vec<int32_t>>(shifted) << 23);
}
// 2^x for x <= 0 (a rounding error above it is fine); 0 where it would be half of the smallest normal number or less, so
// for -infinity; NaN stays.
FASTNN_INLINE Vec<float> vexp2_nonpositive(Vec<float> x) {
  const Vec<float> low = vmax(splat(-127.0f), x), shifted = low + kExponentShift;
  return exp2_of(shifted, low - (shifted - kExponentShift));
}
// e^x likewise. x log2(e) - n in two parts, so that no digit of x is lost.
FASTNN_INLINE Vec<float> vexp_nonpositive(Vec<float> x) {
  const Vec<float> low = vmax(splat(-88.0297f), x), shifted = fma(low, splat(1.44269502f), splat(kExponentShift));
  const Vec<float> r = fma(low, splat(1.44269502f), -(shifted - kExponentShift));
  return exp2_of(shifted, fma(low, splat(1.92596299e-8f), r));
}

// e^x - 1 for x in [-87, 87]; NaN stays. One step takes n ln 2 away: its error, n 2e-9, is small beside that of e^x
// itself, and there is none near 0.
FASTNN_INLINE Vec<float> vexpm1(Vec<float> x) {
  const Vec<float> shifted = fma(x, splat(1.44269504f), splat(kExponentShift));
  const Vec<float> r = fma(shifted - kExponentShift, splat(-0.693147181f), x);
  const Vec<float> scale = bitcast<Vec<float>>(bitcast<Vec<int32_t>>(shifted) << 23);
  return fma(scale, expm1_near_0(r), scale - 1.0f);
}

// (e^2t - 1) / (e^2t + 1), t = |x|: nothing cancels.
FASTNN_INLINE Vec<float> vtanh(Vec<float> x) {
  const Vec<float> t = vmin(splat(9.1f), vabs<float>(x));  // tanh(9.1) rounds to 1
  const Vec<float> e = vexpm1(t + t);
  return copysign<float>(e / (e + 2.0f), x);
}

// 1 - exp(-t h(t)), t = |x|: no second branch near 0, since expm1 keeps its digits there.
FASTNN_INLINE Vec<float> verf(Vec<float> x) {
  constexpr float h[] = {-1.128379172f,    -0.6366193819f,   -0.1027778308f,    0.01915306502f,  0.0001603941847f,
                         -0.001667025711f, 0.0006328359548f, -0.0001176410322f, 9.256239686e-06f};
  const Vec<float> t = vmin(splat(3.95f), vabs<float>(x));  // erf(3.95) rounds to 1
  return copysign<float>(vexpm1(t * polynomial(t, h)), x);
}

// log(1 + u) for u in [0, 1]: 2 atanh(u / (2 + u)).
FASTNN_INLINE Vec<float> vlog1p_unit(Vec<float> u) {
  const Vec<float> s = u / (u + 2.0f);
  constexpr float p[] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9, 2.0f / 11, 2.0f / 13, 2.0f / 15};
  return s * polynomial(s * s, p);
}

FASTNN_INLINE Vec<double> vexp(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return std::exp(v); });
}
FASTNN_INLINE Vec<double> vexp_nonpositive(Vec<double> x) { return vexp(x); }
FASTNN_INLINE Vec<double> vexpm1(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return std::expm1(v); });
}
FASTNN_INLINE Vec<double> vtanh(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return std::tanh(v); });
}
FASTNN_INLINE Vec<double> verf(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return std::erf(v); });
}
FASTNN_INLINE Vec<double> vlog1p_unit(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return std::log1p(v); });
}

// With e = exp(-|x|), σ(x) is 1 / (1 + e) or e / (1 + e).
template <class C>
FASTNN_INLINE Vec<C> vsigmoid(Vec<C> x) {
  const Vec<C> e = vexp_nonpositive(-vabs<C>(x));
  return (x < C(0) ? e : splat<C>(C(1))) / (e + C(1));
}
template <class C>
FASTNN_INLINE Vec<C> vsilu(Vec<C> x) {
  const Vec<C> e = vexp_nonpositive(-vabs<C>(x));
  return (x < C(0) ? x * e : x) / (e + C(1));
}

// tanh(softplus(x)) without a logarithm: with e = exp(x), (e^2 + 2e) / (e^2 + 2e + 2).
template <class C>
FASTNN_INLINE Vec<C> tanh_softplus(Vec<C> x) {
  const Vec<C> e = vexp(x > C(20) ? splat(C(20)) : x), q = e * (e + C(2));
  return q / (q + C(2));
}

// y = f(z).
template <Activation A, class C>
FASTNN_INLINE Vec<C> activate(Vec<C> z) {
  const Vec<C> nil = zero<C>();
  if constexpr (A == Activation::None) return z;
  if constexpr (A == Activation::Relu) return z < nil ? nil : z;
  if constexpr (A == Activation::Gelu) return z * C(0.5) * (verf(z * C(0.70710678118654752440)) + C(1));
  if constexpr (A == Activation::GeluTanh)
    return z * C(0.5) * (vtanh((z + z * z * z * C(0.044715)) * C(0.79788456080286535588)) + C(1));
  if constexpr (A == Activation::Silu) return vsilu<C>(z);
  if constexpr (A == Activation::Sigmoid) return vsigmoid<C>(z);
  if constexpr (A == Activation::Tanh) return vtanh(z);
  if constexpr (A == Activation::LeakyRelu) return z > nil ? z : z * C(0.01);
  if constexpr (A == Activation::Elu) {
    const Vec<C> low = z > nil ? nil : z;
    return z > nil ? z : vexpm1(low < C(-87) ? splat(C(-87)) : low);
  }
  if constexpr (A == Activation::Hardswish) {
    const Vec<C> shifted = z + C(3), low = shifted < nil ? nil : shifted;
    return z * ((low > C(6) ? splat(C(6)) : low) * C(1.0 / 6));
  }
  if constexpr (A == Activation::Relu6) {
    const Vec<C> low = z < nil ? nil : z;
    return low > C(6) ? splat(C(6)) : low;
  }
  if constexpr (A == Activation::Softplus) {
    const Vec<C> y = (z < nil ? nil : z) + vlog1p_unit(vexp_nonpositive(-vabs<C>(z)));
    return z > C(20) ? z : y;
  }
  if constexpr (A == Activation::Mish) return z > C(20) ? z : z * tanh_softplus<C>(z);
}

// g · f'(z), from `saved`: y = f(z) where activation_from_output(A), else z.
template <Activation A, class C>
FASTNN_INLINE Vec<C> activate_backward(Vec<C> g, Vec<C> saved) {
  const Vec<C> nil = zero<C>(), s = saved;
  if constexpr (A == Activation::None) return g;
  if constexpr (A == Activation::Relu) return s <= nil ? nil : g;
  if constexpr (A == Activation::Gelu) {
    const Vec<C> cdf = (verf(s * C(0.70710678118654752440)) + C(1)) * C(0.5);
    const Vec<C> pdf = vexp_nonpositive(s * s * C(-0.5)) * C(0.39894228040143267794);
    return g * fma(s, pdf, cdf);
  }
  if constexpr (A == Activation::GeluTanh) {
    const Vec<C> t = vtanh((s + s * s * s * C(0.044715)) * C(0.79788456080286535588));
    const Vec<C> inner = (s * s * C(3 * 0.044715) + C(1)) * C(0.79788456080286535588);
    return g * C(0.5) * ((t + C(1)) + s * (C(1) - t * t) * inner);
  }
  if constexpr (A == Activation::Silu) {
    const Vec<C> y = vsigmoid<C>(s);
    return g * y * (s * (C(1) - y) + C(1));
  }
  if constexpr (A == Activation::Sigmoid) return g * s * (C(1) - s);
  if constexpr (A == Activation::Tanh) return g * (C(1) - s * s);
  if constexpr (A == Activation::LeakyRelu) return s > nil ? g : g * C(0.01);
  if constexpr (A == Activation::Elu) return s > nil ? g : g * (s + C(1));
  if constexpr (A == Activation::Hardswish) {
    const Vec<C> inner = g * (s * C(1.0 / 3) + C(0.5));
    return s <= C(-3) ? nil : (s < C(3) ? inner : g);
  }
  if constexpr (A == Activation::Relu6) return (s <= nil) | (s >= C(6)) ? nil : g;
  if constexpr (A == Activation::Softplus) return s > C(20) ? g : g * vsigmoid<C>(s);
  if constexpr (A == Activation::Mish) {
    const Vec<C> t = tanh_softplus<C>(s);
    return g * fma(s * vsigmoid<C>(s), C(1) - t * t, t);
  }
}

// Calls f(std::integral_constant<Activation, A>) for the activation chosen at run time.
template <class F>
FASTNN_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
#define FASTNN_CASE(A) \
  case Activation::A: return f(std::integral_constant<Activation, Activation::A>{});
    FASTNN_CASE(None)
    FASTNN_CASE(Relu)
    FASTNN_CASE(Gelu)
    FASTNN_CASE(GeluTanh)
    FASTNN_CASE(Silu)
    FASTNN_CASE(Sigmoid)
    FASTNN_CASE(Tanh)
    FASTNN_CASE(LeakyRelu)
    FASTNN_CASE(Elu)
    FASTNN_CASE(Hardswish)
    FASTNN_CASE(Relu6)
    FASTNN_CASE(Softplus)
    FASTNN_CASE(Mish)
#undef FASTNN_CASE
  }
}

// In place over `count` elements of compute type, a whole number of vectors (padding is activated, too).
template <class C>
__attribute__((noinline)) void activate_in_place(Activation activation, C* data, int64_t count) {
  with_activation(activation, [&](auto a) {
    for (int64_t i = 0; i < count; i += kLanes<C>) store(data + i, activate<decltype(a)::value, C>(load(data + i)));
  });
}

// out[i] = grad[i] · f'(saved[i]) over `count` elements of any number.
template <class T, class O>
__attribute__((noinline)) void activate_backward_row(Activation activation, const T* grad, const T* saved, O* out,
                                                     int64_t count) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  with_activation(activation, [&](auto a) {
    constexpr Activation A = decltype(a)::value;
    int64_t i = 0;
    for (; i + L <= count; i += L) store(out + i, activate_backward<A, C>(load(grad + i), load(saved + i)));
    if (i < count)
      store_first(out + i, activate_backward<A, C>(load_first(grad + i, count - i), load_first(saved + i, count - i)),
                  count - i);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

// Storage types and the types that sums are kept in: float, or double for double.
#pragma once

#include "cuda/ptx.cuh"

namespace fastnn::cuda {

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

FASTNN_DEVICE float widen(float x) { return x; }
FASTNN_DEVICE double widen(double x) { return x; }
FASTNN_DEVICE float widen(BFloat16 x) { return bitcast<float>(static_cast<uint32_t>(x.bits) << 16); }
FASTNN_DEVICE float widen(Float16 x) { return ptx::half_to_float(x.bits); }

template <class T>
FASTNN_DEVICE T narrow(Compute<T> x) {
  if constexpr (sizeof(T) > 2)
    return x;
  else
    return T{0};
}
template <>
FASTNN_DEVICE BFloat16 narrow<BFloat16>(float x) {
  return {ptx::float_to_bfloat(x)};
}
template <>
FASTNN_DEVICE Float16 narrow<Float16>(float x) {
  return {ptx::float_to_half(x)};
}

// Elements in 16 bytes: what a thread loads or stores at once.
template <class T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

}  // namespace fastnn::cuda

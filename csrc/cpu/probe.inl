// The loops that bench/peak.py times: FMAs that never wait for one another, and a sum over memory.
//
// 12 accumulators cover the latency of an FMA on two pipes (4-5 cycles x 2) and still fit in 16 registers.
#pragma once

#include "cpu/probe_kernels.h"
#include "cpu/vec.h"

namespace fastnn::cpu::FASTNN_ISA {

template <class C>
double probe_fma_rounds(int64_t rounds) {
  volatile C factor = C(0.5), addend = C(0.25);  // read once, unknown to the compiler
  const Vec<C> a = splat<C>(factor), b = splat<C>(addend);
  Vec<C> sum[12];
  for (int i = 0; i < 12; ++i) sum[i] = splat<C>(C(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sum[i] = fma(sum[i], a, b);
  }
  volatile C sink = 0;
  for (int i = 0; i < 12; ++i) sink = sink + sum[i][0];
  return 12.0 * kLanes<C>;
}

inline double probe_fma(DType dtype, int64_t rounds) {
  return dtype == DType::Float64 ? probe_fma_rounds<double>(rounds) : probe_fma_rounds<float>(rounds);
}

// In kStreams long streams at once: one alone does not keep as many lines on their way as a core can wait for.
inline float probe_read(const float* data, int64_t count) {
  constexpr int L = kLanes<float>, kStreams = 4, kAtOnce = 2;
  const int64_t length = count / (kStreams * kAtOnce * L) * kAtOnce * L;
  Vec<float> sum[kStreams * kAtOnce] = {};
  for (int64_t i = 0; i < length; i += kAtOnce * L) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s)
#pragma GCC unroll 2
      for (int j = 0; j < kAtOnce; ++j) sum[s * kAtOnce + j] += load(data + s * length + i + j * L);
  }
  float total = 0;
  for (const Vec<float>& part : sum) total += part[0];
  return total;
}

inline constexpr ProbeKernels probe_kernels = {probe_fma, probe_read};

}  // namespace fastnn::cpu::FASTNN_ISA

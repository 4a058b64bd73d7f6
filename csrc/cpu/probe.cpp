#include "fastnn/probe.h"

#include <chrono>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/probe_kernels.h"
#include "cpu/scratch.h"

namespace fastnn::cpu {

extern const ProbeKernels probe_baseline;
#if defined(__x86_64__)
extern const ProbeKernels probe_avx2, probe_avx512;
static constexpr Variants<ProbeKernels> variants = {{&probe_baseline, &probe_avx2, &probe_avx512}};
#else
static constexpr Variants<ProbeKernels> variants = {{&probe_baseline, nullptr, nullptr}};
#endif

namespace {

template <class F>
double best_seconds(int runs, int threads, const F& f) {
  double best = 1e30;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    parallel(threads, f);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (seconds.count() < best) best = seconds.count();
  }
  return best;
}

}  // namespace

double probe_fma(DType dtype, int threads) {
  constexpr int64_t rounds = 250'000;  // about a millisecond: some of the runs meet no other process
  const ProbeKernels& kernels = variants.table();
  const double operations = 2.0 * rounds * kernels.fma(dtype, 1);
  int ran = 1;
  const double seconds = best_seconds(60, threads, [&](int thread, int of) {
    if (thread == 0) ran = of;
    kernels.fma(dtype, rounds);
  });
  return operations * ran / seconds;
}

double probe_bandwidth(int64_t bytes, int threads) {
  const ProbeKernels& kernels = variants.table();
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float));
  Scratch<float> data(count);
  parallel(threads, [&](int thread, int of) {
    const Range own = share(count, 4096, thread, of);
    for (int64_t i = own.begin; i < own.end; ++i) data[i] = 1;
  });
  volatile float sink = 0;
  const double seconds = best_seconds(15, threads, [&](int thread, int of) {
    const Range own = share(count, 4096, thread, of);
    const float sum = kernels.read(data + own.begin, own.end - own.begin);
    if (thread == 0) sink = sum;
  });
  return static_cast<double>(count) * sizeof(float) / seconds;
}

}  // namespace fastnn::cpu

#include "cpu/dispatch.h"

#include <pthread.h>

#include <cstdlib>
#include <cstring>

#include "cpu/parallel.h"

namespace fastnn::cpu {

bool forked = false;

namespace {

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Isa best_isa() {
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return Isa::Baseline;
}

Isa& chosen() {
  static Isa isa = [] {
    const char* forced = std::getenv("FASTNN_CPU_ISA");
    for (int i = 0; forced && i < kIsaCount; ++i)
      if (!std::strcmp(forced, kIsaNames[i]) && isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
    return best_isa();
  }();
  return isa;
}

}  // namespace

bool isa_available(Isa isa) {
  if (isa == Isa::Baseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#if defined(FASTNN_AVX512_ON_AVX2)
  return avx2;
#endif
  if (isa == Isa::Avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa current_isa() { return chosen(); }

bool set_isa(const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kIsaNames[i]) || !isa_available(static_cast<Isa>(i))) continue;
    chosen() = static_cast<Isa>(i);
    return true;
  }
  return false;
}

}  // namespace fastnn::cpu

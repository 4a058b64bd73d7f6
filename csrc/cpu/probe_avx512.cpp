#include "cpu/isa_avx512.h"
#include "cpu/probe.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const ProbeKernels probe_avx512;
const ProbeKernels probe_avx512 = avx512::probe_kernels;
}  // namespace fastnn::cpu

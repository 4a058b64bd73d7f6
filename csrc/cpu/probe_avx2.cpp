#include "cpu/isa_avx2.h"
#include "cpu/probe.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const ProbeKernels probe_avx2;
const ProbeKernels probe_avx2 = avx2::probe_kernels;
}  // namespace fastnn::cpu

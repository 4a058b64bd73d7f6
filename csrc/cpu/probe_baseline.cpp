#include "cpu/isa_baseline.h"
#include "cpu/probe.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const ProbeKernels probe_baseline;
const ProbeKernels probe_baseline = baseline::probe_kernels;
}  // namespace fastnn::cpu

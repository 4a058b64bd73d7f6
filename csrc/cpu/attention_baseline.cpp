#include "cpu/isa_baseline.h"
#include "cpu/attention_backward.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const AttentionKernels attention_baseline;
const AttentionKernels attention_baseline = baseline::attention_kernels;
}  // namespace fastnn::cpu

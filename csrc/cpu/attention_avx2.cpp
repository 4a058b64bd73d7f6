#include "cpu/isa_avx2.h"
#include "cpu/attention_backward.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const AttentionKernels attention_avx2;
const AttentionKernels attention_avx2 = avx2::attention_kernels;
}  // namespace fastnn::cpu

#include "cpu/isa_avx512.h"
#include "cpu/attention_backward.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const AttentionKernels attention_avx512;
const AttentionKernels attention_avx512 = avx512::attention_kernels;
}  // namespace fastnn::cpu

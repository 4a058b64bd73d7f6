#include "cpu/isa_avx512.h"
#include "cpu/linear.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const LinearKernels linear_avx512;
const LinearKernels linear_avx512 = avx512::linear_kernels;
}  // namespace fastnn::cpu

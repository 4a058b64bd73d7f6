#include "cpu/isa_avx2.h"
#include "cpu/linear.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const LinearKernels linear_avx2;
const LinearKernels linear_avx2 = avx2::linear_kernels;
}  // namespace fastnn::cpu

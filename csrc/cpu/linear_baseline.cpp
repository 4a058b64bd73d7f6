#include "cpu/isa_baseline.h"
#include "cpu/linear.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const LinearKernels linear_baseline;
const LinearKernels linear_baseline = baseline::linear_kernels;
}  // namespace fastnn::cpu

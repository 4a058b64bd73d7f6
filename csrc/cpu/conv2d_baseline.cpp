#include "cpu/conv2d_kernels.h"
#include "cpu/isa_baseline.h"
#include "cpu/conv2d.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const Conv2dKernels conv2d_baseline;
const Conv2dKernels conv2d_baseline = baseline::conv2d_kernels;
}  // namespace fastnn::cpu

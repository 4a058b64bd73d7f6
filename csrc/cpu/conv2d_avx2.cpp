#include "cpu/conv2d_kernels.h"
#include "cpu/isa_avx2.h"
#include "cpu/conv2d.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const Conv2dKernels conv2d_avx2;
const Conv2dKernels conv2d_avx2 = avx2::conv2d_kernels;
}  // namespace fastnn::cpu

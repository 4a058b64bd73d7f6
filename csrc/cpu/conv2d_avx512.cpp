#include "cpu/conv2d_kernels.h"
#include "cpu/isa_avx512.h"
#include "cpu/conv2d.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const Conv2dKernels conv2d_avx512;
const Conv2dKernels conv2d_avx512 = avx512::conv2d_kernels;
}  // namespace fastnn::cpu

#include "fastnn/conv2d.h"

#include "cpu/conv2d_kernels.h"
#include "cpu/dispatch.h"

namespace fastnn::cpu {

extern const Conv2dKernels conv2d_baseline;
#if defined(__x86_64__)
extern const Conv2dKernels conv2d_avx2, conv2d_avx512;
static constexpr Variants<Conv2dKernels> variants = {{&conv2d_baseline, &conv2d_avx2, &conv2d_avx512}};
#else
static constexpr Variants<Conv2dKernels> variants = {{&conv2d_baseline, nullptr, nullptr}};
#endif

void conv2d_forward(const Conv2dParams& p) { variants.table().forward(p); }
void conv2d_backward(const Conv2dBackwardParams& p) { variants.table().backward(p); }
int64_t conv2d_packed_size(const Conv2dParams& p) { return variants.table().packed_size(p); }
void conv2d_pack(const Conv2dParams& p, void* packed) { variants.table().pack(p, packed); }
int64_t conv2d_panel_width(const Conv2dParams& p) { return variants.table().panel_width(p); }

}  // namespace fastnn::cpu

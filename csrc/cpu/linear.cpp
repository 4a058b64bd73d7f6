#include "fastnn/linear.h"

#include "cpu/dispatch.h"
#include "cpu/linear_kernels.h"

namespace fastnn::cpu {

extern const LinearKernels linear_baseline;
#if defined(__x86_64__)
extern const LinearKernels linear_avx2, linear_avx512;
static constexpr Variants<LinearKernels> variants = {{&linear_baseline, &linear_avx2, &linear_avx512}};
#else
static constexpr Variants<LinearKernels> variants = {{&linear_baseline, nullptr, nullptr}};
#endif

void linear_forward(const LinearForward& p) { variants.table().forward(p); }
void linear_backward(const LinearBackward& p) { variants.table().backward(p); }
int64_t linear_packed_size(DType dtype, int64_t N, int64_t K) { return variants.table().packed_size(dtype, N, K); }
void linear_pack(const LinearPack& p) { variants.table().pack(p); }

}  // namespace fastnn::cpu

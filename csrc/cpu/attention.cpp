#include "fastnn/attention.h"

#include "cpu/attention_kernels.h"
#include "cpu/dispatch.h"

namespace fastnn::cpu {

extern const AttentionKernels attention_baseline;
#if defined(__x86_64__)
extern const AttentionKernels attention_avx2, attention_avx512;
static constexpr Variants<AttentionKernels> variants = {{&attention_baseline, &attention_avx2, &attention_avx512}};
#else
static constexpr Variants<AttentionKernels> variants = {{&attention_baseline, nullptr, nullptr}};
#endif

void attention_forward(const AttentionParams& params) { variants.table().forward(params); }
void attention_weights(const AttentionWeightsParams& params) { variants.table().weights(params); }
void attention_backward(const AttentionBackwardParams& params) { variants.table().backward(params); }

}  // namespace fastnn::cpu

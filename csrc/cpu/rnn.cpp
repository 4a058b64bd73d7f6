#include "fastnn/rnn.h"

#include "cpu/dispatch.h"
#include "cpu/rnn_kernels.h"

namespace fastnn::cpu {

extern const RnnKernels rnn_baseline;
#if defined(__x86_64__)
extern const RnnKernels rnn_avx2, rnn_avx512;
static constexpr Variants<RnnKernels> variants = {{&rnn_baseline, &rnn_avx2, &rnn_avx512}};
#else
static constexpr Variants<RnnKernels> variants = {{&rnn_baseline, nullptr, nullptr}};
#endif

void rnn_forward(const RnnParams& params) { variants.table().forward(params); }
void rnn_backward(const RnnBackwardParams& params) { variants.table().backward(params); }
int64_t rnn_packed_size(const RnnPack& params) { return variants.table().packed_size(params); }
void rnn_pack(const RnnPack& params) { variants.table().pack(params); }

}  // namespace fastnn::cpu

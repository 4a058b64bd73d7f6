#include "cpu/isa_avx2.h"
#include "cpu/rnn.inl"
#include "cpu/rnn_backward.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const RnnKernels rnn_avx2;
const RnnKernels rnn_avx2 = {avx2::rnn_forward, avx2::rnn_backward, avx2::rnn_packed_size, avx2::rnn_pack};
}  // namespace fastnn::cpu

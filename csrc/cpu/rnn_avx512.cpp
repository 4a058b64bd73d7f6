#include "cpu/isa_avx512.h"
#include "cpu/rnn.inl"
#include "cpu/rnn_backward.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const RnnKernels rnn_avx512;
const RnnKernels rnn_avx512 = {avx512::rnn_forward, avx512::rnn_backward, avx512::rnn_packed_size, avx512::rnn_pack};
}  // namespace fastnn::cpu

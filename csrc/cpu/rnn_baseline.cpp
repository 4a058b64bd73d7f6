#include "cpu/isa_baseline.h"
#include "cpu/rnn.inl"
#include "cpu/rnn_backward.inl"
#include "cpu/isa_end.h"

namespace fastnn::cpu {
extern const RnnKernels rnn_baseline;
const RnnKernels rnn_baseline = {baseline::rnn_forward, baseline::rnn_backward, baseline::rnn_packed_size,
                                 baseline::rnn_pack};
}  // namespace fastnn::cpu

// The table of recurrent kernels that each ISA's stub exports.
#pragma once

#include "fastnn/rnn.h"

namespace fastnn::cpu {

struct RnnKernels {
  void (*forward)(const RnnParams&);
  void (*backward)(const RnnBackwardParams&);
};

// A weight is packed once for the sequence where enough rows of it repay that; a cell, or a few steps at batch one, runs
// on dot products along the weight's own rows. A 16-bit weight would be widened again for each row.
inline bool rnn_packs(const RnnParams& p) { return p.rows > (p.dtype <= DType::Float64 ? 16 : 2); }

}  // namespace fastnn::cpu

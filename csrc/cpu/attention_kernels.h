// The table that each ISA's stub of attention exports.
#pragma once

#include "fastnn/attention.h"

namespace fastnn::cpu {

struct AttentionKernels {
  void (*forward)(const AttentionParams&);
  void (*weights)(const AttentionWeightsParams&);
  void (*backward)(const AttentionBackwardParams&);
};

}  // namespace fastnn::cpu

// The table of linear kernels that each ISA's stub exports.
#pragma once

#include "fastnn/linear.h"

namespace fastnn::cpu {

struct LinearKernels {
  void (*forward)(const LinearForward&);
  void (*backward)(const LinearBackward&);
  int64_t (*packed_size)(DType, int64_t N, int64_t K);
  void (*pack)(const LinearPack&);
};

}  // namespace fastnn::cpu

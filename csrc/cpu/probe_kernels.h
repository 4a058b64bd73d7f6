// The table of probes that each ISA's stub exports.
#pragma once

#include "fastnn/probe.h"

namespace fastnn::cpu {

struct ProbeKernels {
  double (*fma)(DType dtype, int64_t rounds);       // runs 2 * rounds * (the result) operations
  float (*read)(const float* data, int64_t count);  // sums the data, so that it must be read
};

}  // namespace fastnn::cpu

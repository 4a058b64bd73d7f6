// The table of convolution kernels that each ISA's stub exports.
#pragma once

#include "fastnn/conv2d.h"

namespace fastnn::cpu {

struct Conv2dKernels {
  void (*forward)(const Conv2dParams&);
  void (*backward)(const Conv2dBackwardParams&);
  int64_t (*packed_size)(const Conv2dParams&);
  void (*pack)(const Conv2dParams&, void* packed);
  int64_t (*panel_width)(const Conv2dParams&);
};

}  // namespace fastnn::cpu

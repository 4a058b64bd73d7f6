// What this machine can do at best, measured: the two limits that bench/ counts times against.
#pragma once

#include "fastnn/types.h"

namespace fastnn::cpu {

// Multiply-adds per second, each counted as 2, of independent FMAs in registers. Float64, or Float32 for any other.
double probe_fma(DType dtype, int threads);

// Bytes per second of reading `bytes` of memory once, in order, each thread its own share.
double probe_bandwidth(int64_t bytes, int threads);

}  // namespace fastnn::cpu

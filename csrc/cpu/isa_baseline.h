// Opens the region of kernels for the platform's baseline: SSE2 on x86-64, NEON on AArch64. Closed by isa_end.h.
#pragma once
#include "cpu/isa.h"

#define FASTNN_ISA baseline
#define FASTNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTNN_VECTOR_REGISTERS 32
#else
#define FASTNN_VECTOR_REGISTERS 16
#endif
#pragma GCC push_options

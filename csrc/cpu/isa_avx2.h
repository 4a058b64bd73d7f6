// Opens the region of kernels for x86-64 with AVX2, FMA and F16C (Haswell, Zen and later). Closed by isa_end.h.
#pragma once
#include "cpu/isa.h"

#define FASTNN_ISA avx2
#define FASTNN_VECTOR_BYTES 32
#define FASTNN_VECTOR_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

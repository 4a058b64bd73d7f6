// Opens the region of kernels for x86-64 with AVX-512 F, BW, DQ and VL (Skylake-X, Zen 4 and later). Closed by isa_end.h.
#pragma once
#include "cpu/isa.h"

#define FASTNN_ISA avx512
#define FASTNN_VECTOR_BYTES 64
#define FASTNN_VECTOR_REGISTERS 32
#if defined(FASTNN_AVX512_ON_AVX2)  // 64-byte vectors in two halves (GCC): make test-avx512
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif

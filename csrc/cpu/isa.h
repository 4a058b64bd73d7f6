// Everything a kernel includes that is not its own: standard headers and types, compiled as baseline code.
//
// A stub includes this first, then opens its ISA region (isa_avx2.h, …), then the kernels. Templates of the standard
// library that were seen before the region stay baseline code, so no AVX2 copy of std::… can be picked by the linker
// for a CPU without AVX2.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "fastnn/types.h"

#define FASTNN_INLINE inline __attribute__((always_inline))

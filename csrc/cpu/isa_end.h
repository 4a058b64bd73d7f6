// Closes the region that isa_baseline.h, isa_avx2.h or isa_avx512.h opened.
#if defined(__clang__)
#if FASTNN_VECTOR_BYTES > 16
#pragma clang attribute pop
#endif
#else
#pragma GCC pop_options
#endif

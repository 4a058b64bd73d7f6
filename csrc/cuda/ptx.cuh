// Every PTX instruction that kernels use, each behind one function: the device's version beside the host's, which is
// that of tests/cuda_host/shim and lets g++ run the same kernels with no GPU. `g` below is lane / 4, `t` is lane % 4.
//
// Shared memory is reached through shared_load, shared_store, cp_async and ldmatrix alone: on the host they watch every
// access for what a GPU leaves undefined. On sm_75 cp_async copies at once, and m16n8k16 is made of two m16n8k8.
// Source: PTX ISA 9.0, sections 9.7.9 (data movement), 9.7.14 (matrix multiply-accumulate).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "fastnn/types.h"

#define FASTNN_DEVICE __device__ __forceinline__
#define FASTNN_HOST_DEVICE __host__ __device__ __forceinline__

// Where nvcc compiles for the CPU there is neither: such a function is never called there.
#if defined(__CUDA_ARCH__)
#define FASTNN_PTX(on_device, on_host) on_device
#elif defined(FASTNN_CUDA_SHIM)
#define FASTNN_PTX(on_device, on_host) on_host
#else
#define FASTNN_PTX(on_device, on_host)
#endif

namespace fastnn::cuda {

#if defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 800;
#endif

// N elements that move as one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T data[N];
};

template <class To, class From>
FASTNN_HOST_DEVICE To bitcast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

namespace ptx {

// ---- shared memory -------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes. There is no other: kernels declare no __shared__ variables.
FASTNN_DEVICE unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
#else
  return host::dynamic_shared();
#endif
}

template <class V>
FASTNN_DEVICE V shared_load(const void* from) {
  V value;
  FASTNN_PTX(value = *static_cast<const V*>(from), host::shared_load(&value, from, sizeof(V)));
  return value;
}

template <class V>
FASTNN_DEVICE void shared_store(void* to, const V& value) {
  FASTNN_PTX(*static_cast<V*>(to) = value, host::shared_store(to, &value, sizeof(V)));
}

FASTNN_DEVICE uint32_t shared_address(const void* pointer) {
  uint32_t address = 0;
  FASTNN_PTX(address = static_cast<uint32_t>(__cvta_generic_to_shared(pointer)), (void)pointer);
  return address;
}

// ---- global memory -------------------------------------------------------------------------------------------------

// One store of 16 bytes, which the compiler would otherwise take apart where the vector was made element by element.
template <class V>
FASTNN_DEVICE void global_store_16(void* to, const V& value) {
  static_assert(sizeof(V) == 16);
#if defined(__CUDA_ARCH__)
  const auto words = bitcast<Vector<uint32_t, 4>>(value);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.data[0]), "r"(words.data[1]),
               "r"(words.data[2]), "r"(words.data[3])
               : "memory");
#else
  *static_cast<V*>(to) = value;
#endif
}

// ---- cp.async ------------------------------------------------------------------------------------------------------

// Copies the first `bytes` (even) of SIZE = 4, 8 or 16 from global to shared memory and fills the rest with zeros. Both
// addresses are aligned to SIZE. The data is there after cp_async_wait, for other threads after a barrier behind it.
template <int SIZE>
FASTNN_DEVICE void cp_async(void* to, const void* from, int bytes) {
  static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16);
#if defined(__CUDA_ARCH__)
  if constexpr (kArch >= 800) {
    if constexpr (SIZE == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                   : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(SIZE),
                   "r"(bytes)
                   : "memory");
  } else {
    Vector<uint32_t, SIZE / 4> words;
    if (bytes == SIZE) {
      words = *static_cast<const Vector<uint32_t, SIZE / 4>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < SIZE / 4; ++i)
        words.data[i] = 4 * i + 4 <= bytes   ? static_cast<const uint32_t*>(from)[i]
                        : 4 * i + 2 <= bytes ? static_cast<const uint16_t*>(from)[2 * i]
                                             : 0u;
    }
    *static_cast<Vector<uint32_t, SIZE / 4>*>(to) = words;
  }
#elif defined(FASTNN_CUDA_SHIM)
  host::cp_async(to, from, SIZE, bytes);
#endif
}

FASTNN_DEVICE void cp_async_commit() {
  if constexpr (kArch >= 800) FASTNN_PTX(asm volatile("cp.async.commit_group;" :: : "memory"), host::cp_async_commit());
}

// Until all but the newest PENDING groups of this thread have landed.
template <int PENDING>
FASTNN_DEVICE void cp_async_wait() {
  if constexpr (kArch >= 800)
    FASTNN_PTX(asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"), host::cp_async_wait(PENDING));
}

// ---- ldmatrix ------------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i, 16 bytes aligned to 16.
// r[i] holds elements 2t and 2t + 1 of row g of matrix i; transposed: of column g.
FASTNN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  FASTNN_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
                          "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))),
             host::ldmatrix_x4(r, row, false));
}
FASTNN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  FASTNN_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                          "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))),
             host::ldmatrix_x4(r, row, true));
}

// ---- mma.sync ------------------------------------------------------------------------------------------------------

// c += a b with a [16, 16], b [16, 8], c [16, 8]. a[0]: row g, columns 2t and 2t + 1; a[1]: row g + 8; a[2], a[3]: the
// same, 8 columns on. b[0]: rows 2t and 2t + 1 of column g; b[1]: 8 rows on. c[0], c[1]: row g, columns 2t and 2t + 1;
// c[2], c[3]: row g + 8.
FASTNN_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
#if defined(__CUDA_ARCH__)
  if constexpr (kArch >= 800) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
#elif defined(FASTNN_CUDA_SHIM)
  host::mma_m16n8k16(c, a, b, true);
#endif
}
// bfloat16 needs sm_80: below it no kernel that holds this is chosen.
FASTNN_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  if constexpr (kArch >= 800)
    FASTNN_PTX(
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};" : "+f"(c[0]),
            "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
        host::mma_m16n8k16(c, a, b, false));
}

// c += a b in TF32 (the low 13 bits of each float are dropped), a [16, 8], b [8, 8]. a[0]: row g, column t; a[1]: row
// g + 8; a[2], a[3]: the same, 4 columns on. b[0]: row t of column g; b[1]: 4 rows on. sm_80.
FASTNN_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kArch >= 800)
    FASTNN_PTX(
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};" : "+f"(c[0]),
            "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
        host::mma_m16n8k8_tf32(c, a, b));
}

// c += a b with a [8, 4], b [4, 8], c [8, 8]. a: row g, column t; b: row t of column g; c: row g, columns 2t and 2t +
// 1. sm_80; worth it only where the chip has double-precision tensor cores (8.0, 9.0, 10.0).
FASTNN_DEVICE void mma_m8n8k4_f64(double (&c)[2], double a, double b) {
  if constexpr (kArch >= 800)
    FASTNN_PTX(asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+d"(c[0]),
                   "+d"(c[1]) : "d"(a), "d"(b)),
               host::mma_m8n8k4_f64(c, a, b));
}

// Ends the kernel with an error: for what no plan chooses.
FASTNN_DEVICE void trap() { FASTNN_PTX(asm volatile("trap;"), host::trap()); }

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// a / b within 2 ulp, without the branch that IEEE division takes.
FASTNN_DEVICE float divide(float a, float b) {
  float quotient = 0;
  FASTNN_PTX(asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b)), quotient = a / b);
  return quotient;
}
FASTNN_DEVICE double divide(double a, double b) { return a / b; }

// 2^x within 2 ulp; results below the smallest normal float are 0.
FASTNN_DEVICE float exp2_approximate(float x) {
  float power = 0;
  FASTNN_PTX(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x)), power = host::exp2_approximate(x));
  return power;
}

// The same number, of which the compiler knows nothing: what is worked out of it in a loop is not kept in registers from
// before the loop.
FASTNN_DEVICE int opaque(int x) {
  FASTNN_PTX(asm volatile("" : "+r"(x)), (void)x);
  return x;
}

// ---- conversions ---------------------------------------------------------------------------------------------------

FASTNN_DEVICE float half_to_float(uint16_t bits) {
  float value = 0;
  FASTNN_PTX(asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits)), value = host::half_to_float(bits));
  return value;
}
FASTNN_DEVICE uint16_t float_to_half(float value) {  // to nearest even
  uint16_t bits = 0;
  FASTNN_PTX(asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)), bits = host::float_to_half(value));
  return bits;
}
FASTNN_DEVICE uint16_t float_to_bfloat(float value) {  // to nearest even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = bitcast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
// Two floats as one pair of 16-bit elements, `low` in the low half; for bfloat16 on sm_80.
FASTNN_DEVICE uint32_t pack_pair(float low, float high, Float16) {
  uint32_t pair = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  pair = float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#endif
  return pair;
}
FASTNN_DEVICE uint32_t pack_pair(float low, float high, BFloat16) {
  uint32_t pair = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  pair = float_to_bfloat(low) | static_cast<uint32_t>(float_to_bfloat(high)) << 16;
#endif
  return pair;
}

}  // namespace ptx
}  // namespace fastnn::cuda

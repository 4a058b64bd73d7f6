// What sm_90a adds to ptx.cuh: mbarriers, TMA, wgmma, named barriers, the exchange of registers between warpgroups. As
// there, each instruction is one function with the device's and the host's version. Elsewhere than on sm_90a the
// functions are empty: no kernel that holds them is chosen there.
//
// The async proxy (TMA, wgmma) does not see what ordinary stores left in shared memory before fence_async by the thread
// that stored, followed by a barrier. Source: PTX ISA 9.0, sections 9.7.9.25 (cp.async.bulk), 9.7.13 (barriers,
// mbarrier), 9.7.15 (wgmma).
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTNN_SM90(on_device, on_host) on_device
#elif defined(FASTNN_CUDA_SHIM)
#define FASTNN_SM90(on_device, on_host) on_host
#else
#define FASTNN_SM90(on_device, on_host)
#endif

namespace fastnn::cuda::ptx {

// ---- mbarrier ------------------------------------------------------------------------------------------------------

// A phase ends when `arrivals` arrivals have come and as many bytes as were expected. Eight bytes of shared memory,
// aligned. Before others may use it: mbarrier_init_fence by the thread that made it, then a barrier.
FASTNN_DEVICE void mbarrier_init(uint64_t* bar, int arrivals) {
  FASTNN_SM90(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory"),
      host::mbarrier_init(bar, arrivals));
}
FASTNN_DEVICE void mbarrier_init_fence() {
  FASTNN_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"), host::mbarrier_init_fence());
}

FASTNN_DEVICE void mbarrier_arrive(uint64_t* bar) {
  FASTNN_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory"),
              host::mbarrier_arrive(bar, 0));
}
// Arrives, and makes the phase wait for `bytes` more of TMA's.
FASTNN_DEVICE void mbarrier_arrive_expect(uint64_t* bar, int bytes) {
  FASTNN_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
                           "r"(bytes) : "memory"),
              host::mbarrier_arrive(bar, bytes));
}

// Until the phase of this parity has ended: phase 0, 2, 4… has parity 0. On a fresh barrier parity 1 is no wait.
FASTNN_DEVICE void mbarrier_wait(uint64_t* bar, int parity) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
  } while (!done);
#elif defined(FASTNN_CUDA_SHIM)
  host::mbarrier_wait(bar, parity);
#endif
}

// ---- barriers of some warps ----------------------------------------------------------------------------------------

// Waits until `threads` threads (whole warps) are at barrier `id`, 1 .. 15, those that only arrive among them.
FASTNN_DEVICE void named_barrier(int id, int threads) {
  FASTNN_SM90(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
              host::named_barrier(id, threads, true));
}
FASTNN_DEVICE void named_barrier_arrive(int id, int threads) {
  FASTNN_SM90(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
              host::named_barrier(id, threads, false));
}

// ---- registers -----------------------------------------------------------------------------------------------------

// A warpgroup takes registers, or gives them up: N for each thread from now on, a multiple of 8 from 24 to 256.
template <int N>
FASTNN_DEVICE void registers_add() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  FASTNN_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)), host::registers(N));
}
template <int N>
FASTNN_DEVICE void registers_drop() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  FASTNN_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)), host::registers(N));
}

// ---- TMA -----------------------------------------------------------------------------------------------------------

// Ordinary stores to shared memory before it are seen by TMA and wgmma behind it (and behind a barrier, for others).
FASTNN_DEVICE void fence_async() {
  FASTNN_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), host::fence_async());
}

FASTNN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  FASTNN_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), (void)map);
}

// The box of the map at coordinates `at`, that of dimension 0 first, to shared memory aligned to 128 bytes; the bytes
// of the whole box count at `bar`. By one thread.
template <int RANK>
FASTNN_DEVICE void tma_load(void* to, const TensorMap* map, uint64_t* bar, const int (&at)[RANK]) {
  static_assert(RANK >= 2 && RANK <= 5);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTNN_LOAD(rank, coordinates, ...)                                                         \
  asm volatile("cp.async.bulk.tensor." rank                                                         \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates \
               "}], [%2];" ::"r"(shared_address(to)),                                               \
               "l"(map), "r"(shared_address(bar)), __VA_ARGS__                                      \
               : "memory")
  if constexpr (RANK == 2)
    FASTNN_LOAD("2d", "%3, %4", "r"(at[0]), "r"(at[1]));
  else if constexpr (RANK == 3)
    FASTNN_LOAD("3d", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  else if constexpr (RANK == 4)
    FASTNN_LOAD("4d", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  else
    FASTNN_LOAD("5d", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef FASTNN_LOAD
#elif defined(FASTNN_CUDA_SHIM)
  host::tma_load(to, map, bar, at, RANK);
#endif
}

// The box in shared memory to coordinates `at`: behind fence_async by those who stored it and a barrier. By one thread,
// which commits, and waits before the memory is written again and before it ends.
template <int RANK>
FASTNN_DEVICE void tma_store(const TensorMap* map, const void* from, const int (&at)[RANK]) {
  static_assert(RANK >= 2 && RANK <= 5);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTNN_STORE(rank, coordinates, ...)                                                         \
  asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.tile.bulk_group [%0, {" coordinates \
               "}], [%1];" ::"l"(map),                                                               \
               "r"(shared_address(from)), __VA_ARGS__                                                \
               : "memory")
  if constexpr (RANK == 2)
    FASTNN_STORE("2d", "%2, %3", "r"(at[0]), "r"(at[1]));
  else if constexpr (RANK == 3)
    FASTNN_STORE("3d", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  else if constexpr (RANK == 4)
    FASTNN_STORE("4d", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  else
    FASTNN_STORE("5d", "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef FASTNN_STORE
#elif defined(FASTNN_CUDA_SHIM)
  host::tma_store(map, from, at, RANK);
#endif
}
FASTNN_DEVICE void tma_store_commit() {
  FASTNN_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory"), host::tma_store_commit());
}
// Until all but the newest PENDING groups of this thread have read their shared memory.
template <int PENDING>
FASTNN_DEVICE void tma_store_wait() {
  FASTNN_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"),
              host::tma_store_wait(PENDING));
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

// Of an operand in shared memory with the 128-byte swizzle, in tiles of 8 rows of 128 bytes that start on 1024 bytes.
//   Along K (a row of a tile is 64 elements along K, its 8 rows are 8 of M or N): stride_bytes lie between a tile and
//   the next 8 of M or N; leading_bytes has no meaning. The next 16 along K: `shared` + 32 bytes.
//   Along M or N (a row is 64 elements of M or N, its 8 rows are 8 along K): stride_bytes lie between a tile and the
//   next 8 along K, leading_bytes between it and the next 64 of M or N. The next 16 along K: `shared` + 2 stride_bytes.
FASTNN_DEVICE uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
  uint32_t address = 0;
  FASTNN_SM90(address = shared_address(shared), address = host::shared_offset(shared));
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4 & 0x3fff) << 32 | uint64_t{1} << 62;
}

// The compiler keeps what it does with these registers before it, or behind it.
template <int COUNT>
FASTNN_DEVICE void hold_registers(float (&d)[COUNT]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
template <int COUNT>
FASTNN_DEVICE void hold_registers(uint32_t (&a)[COUNT]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(a[i])::"memory");
#endif
}

// Before the first wgmma of a batch: registers that it reads or writes were touched in between. Name them.
template <class... Registers>
FASTNN_DEVICE void wgmma_fence(Registers&... registers) {
  (hold_registers(registers), ...);
  FASTNN_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), host::wgmma_fence());
}
FASTNN_DEVICE void wgmma_commit() {
  FASTNN_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"), host::wgmma_commit());
}
// Until all but the newest PENDING batches are done. Name the accumulators that may be read from now on.
template <int PENDING, class... Registers>
FASTNN_DEVICE void wgmma_wait(Registers&... registers) {
  FASTNN_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"), host::wgmma_wait(PENDING));
  (hold_registers(registers), ...);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Operands 0 .. N / 2 - 1 are the accumulators; those behind them have their numbers from the caller.
#define FASTNN_D8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTNN_D32(i) FASTNN_D8(i), FASTNN_D8(i + 8), FASTNN_D8(i + 16), FASTNN_D8(i + 24)
#define FASTNN_D64 FASTNN_D32(0)
#define FASTNN_D96 FASTNN_D64, FASTNN_D8(32), FASTNN_D8(40)
#define FASTNN_D128 FASTNN_D64, FASTNN_D32(32)
#define FASTNN_D192 FASTNN_D128, FASTNN_D32(64)
#define FASTNN_D256 FASTNN_D192, FASTNN_D32(96)
#define FASTNN_R64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTNN_R96 \
  FASTNN_R64       \
  ", "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTNN_R128 \
  FASTNN_R96        \
  ", "              \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTNN_R192                                                                  \
  FASTNN_R128                                                                        \
  ", "                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTNN_R256                                                                              \
  FASTNN_R192                                                                                    \
  ", "                                                                                           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTNN_WGMMA(N, type, a, b, scale, a_major, b_major, ...)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
               "." type " {" FASTNN_R##N "}, " a ", " b ", p, 1, 1" a_major b_major ";\n}"                            \
               : FASTNN_D##N                                                                                          \
               : __VA_ARGS__)
// Both operands by descriptor: a, b, scale, the two majors. A from registers: four of them in place of a.
#define FASTNN_WGMMA_SHARED(N, type, i0, i1, i2, i3, i4)                                                       \
  FASTNN_WGMMA(N, type, "%" #i0, "%" #i1, "%" #i2, ", %" #i3, ", %" #i4, "l"(a), "l"(b), "r"(int{accumulate}), \
               "n"(!A_ALONG_K), "n"(!B_ALONG_K))
#define FASTNN_WGMMA_REGISTERS(N, type, i0, i1, i2, i3, i4, i5, i6)                                             \
  FASTNN_WGMMA(N, type, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}", "%" #i4, "%" #i5, "", ", %" #i6, "r"(a[0]), \
               "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(!B_ALONG_K))
#define FASTNN_WGMMA_EACH(SHAPE64, SHAPE96, SHAPE128, SHAPE192, SHAPE256) \
  if constexpr (N == 64)                                                  \
    SHAPE64;                                                              \
  else if constexpr (N == 96)                                             \
    SHAPE96;                                                              \
  else if constexpr (N == 128)                                            \
    SHAPE128;                                                             \
  else if constexpr (N == 192)                                            \
    SHAPE192;                                                             \
  else                                                                    \
    SHAPE256
#define FASTNN_WGMMA_ALL_SHARED(type)                                                                          \
  FASTNN_WGMMA_EACH(                                                                                           \
      FASTNN_WGMMA_SHARED(64, type, 32, 33, 34, 35, 36), FASTNN_WGMMA_SHARED(96, type, 48, 49, 50, 51, 52),    \
      FASTNN_WGMMA_SHARED(128, type, 64, 65, 66, 67, 68), FASTNN_WGMMA_SHARED(192, type, 96, 97, 98, 99, 100), \
      FASTNN_WGMMA_SHARED(256, type, 128, 129, 130, 131, 132))
#define FASTNN_WGMMA_ALL_REGISTERS(type)                                              \
  FASTNN_WGMMA_EACH(FASTNN_WGMMA_REGISTERS(64, type, 32, 33, 34, 35, 36, 37, 38),     \
                    FASTNN_WGMMA_REGISTERS(96, type, 48, 49, 50, 51, 52, 53, 54),     \
                    FASTNN_WGMMA_REGISTERS(128, type, 64, 65, 66, 67, 68, 69, 70),    \
                    FASTNN_WGMMA_REGISTERS(192, type, 96, 97, 98, 99, 100, 101, 102), \
                    FASTNN_WGMMA_REGISTERS(256, type, 128, 129, 130, 131, 132, 133, 134))
#endif

template <class T>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<Float16> = true;

// d = a b (+ d), by the four warps of a warpgroup: a [64, 16], b [N, 16] transposed, d [64, N]. Warp w has rows 16 w ..
// 16 w + 15 of d: d[4 j], d[4 j + 1] are row g, columns 8 j + 2t and 8 j + 2t + 1; d[4 j + 2], d[4 j + 3] row g + 8.
// d has its values behind wgmma_wait, and until then neither d nor the operands in shared memory may be touched.
template <int N, bool A_ALONG_K = true, bool B_ALONG_K = true, class T>
FASTNN_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, T, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kIsHalf<T>) {
    FASTNN_WGMMA_ALL_SHARED("f16");
  } else {
    FASTNN_WGMMA_ALL_SHARED("bf16");
  }
#elif defined(FASTNN_CUDA_SHIM)
  host::wgmma(d, N, nullptr, a, b, A_ALONG_K, B_ALONG_K, kIsHalf<T>, accumulate);
#endif
}
// a from registers, each warp's 16 rows as in mma_m16n8k16; they may not be touched before wgmma_wait either.
template <int N, bool B_ALONG_K, class T>
FASTNN_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, T, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kIsHalf<T>) {
    FASTNN_WGMMA_ALL_REGISTERS("f16");
  } else {
    FASTNN_WGMMA_ALL_REGISTERS("bf16");
  }
#elif defined(FASTNN_CUDA_SHIM)
  host::wgmma(d, N, a, 0, b, true, B_ALONG_K, kIsHalf<T>, accumulate);
#endif
}

}  // namespace fastnn::cuda::ptx

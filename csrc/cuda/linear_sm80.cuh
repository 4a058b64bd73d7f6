// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias) in float16 and bfloat16 on mma.sync, sums in float.
//
// A block makes a tile of 128x128 with 8 warps of 64x32, or of 64x64 with 4 warps of 32x32, in steps of 32 along K. Its
// tiles of A and B come by cp.async through a ring of three stages (48 or 24 KiB, so that two or more blocks share a
// multiprocessor), lie swizzled (tile.cuh), and go to registers by ldmatrix. Either operand may lie with K or with its
// other dimension dense: ldmatrix.trans turns the second kind. Rows, columns and K past the end are filled with zeros
// by cp.async itself; rows that are not aligned to 16 bytes are copied in narrower pieces. With splits, blockIdx.y
// takes its share of K and leaves its sums in memory for linear_reduce_kernel, which adds them in their order.
//
// Bound by the tensor cores for large K, by the stores for small. On sm_75 the copies are plain loads and stores and an
// m16n8k16 is two m16n8k8; its 64 KiB of shared memory hold one block of the large tile. No figure: not yet measured on
// a GPU.
// Source: PTX ISA, fragments of m16n8k16; the pipeline is the one that CUTLASS's documentation describes for sm_80.
#pragma once

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/tile.cuh"

namespace fastnn::cuda {

struct LinearMma {
  RowMatrix a;  // [M, K], or [K, M] where A lies with M dense
  RowMatrix b;  // [N, K], or [K, N]
  int64_t K, k_per_split;
  int64_t tiles_m, tiles_n;
  LinearEpilogue epilogue;
};

// An operand's tile in shared memory: SIDE rows of K elements of that dimension, or K rows of SIDE elements.
template <int SIDE, bool ALONG_K, int THREADS, int K = 32>
struct OperandTile {
  static constexpr int kRows = ALONG_K ? SIDE : K, kChunks = (ALONG_K ? K : SIDE) / 8, kBytes = SIDE * K * 2;

  static FASTNN_DEVICE void copy(unsigned char* tile, const RowMatrix& matrix, int64_t side, int64_t k) {
    copy_tile<kRows, kChunks, THREADS>(tile, matrix, ALONG_K ? side : k, ALONG_K ? k : side);
  }

  // The four 8x8 matrices (side, k), (side + 8, k), (side, k + 8), (side + 8, k + 8), a row of the fragment along
  // `side`.
  static FASTNN_DEVICE void load(uint32_t (&r)[4], const unsigned char* tile, int side, int k) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (ALONG_K)
      ptx::ldmatrix_x4(r, tile + 16 * swizzled<kChunks>(side + lane % 16, k / 8 + lane / 16));
    else
      ptx::ldmatrix_x4_trans(r, tile + 16 * swizzled<kChunks>(k + lane % 8 + lane / 16 * 8, side / 8 + lane / 8 % 2));
  }
};

template <class T, int TILE, bool A_ALONG_K, bool B_ALONG_K>
struct LinearMmaKernel {
  static constexpr LinearTile tile = kMmaTiles[TILE];
  static constexpr int kStages = 3, kWarpsM = 2, kWarpsN = tile.threads / 32 / kWarpsM;
  static constexpr int kWarpM = tile.m / kWarpsM, kWarpN = tile.n / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  using A = OperandTile<tile.m, A_ALONG_K, tile.threads>;
  using B = OperandTile<tile.n, B_ALONG_K, tile.threads>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kWarpM * tile.n * 4 <= kSharedBytes, "the epilogue stages one row of warps at a time");
  static_assert(tile.k == 32 && kFragmentsN % 2 == 0);

  static FASTNN_DEVICE void multiply(float (&sums)[kFragmentsM][kFragmentsN][4], const unsigned char* stage, int warp_m,
                                     int warp_n) {
#pragma unroll
    for (int k = 0; k < tile.k; k += 16) {
      uint32_t a[kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) A::load(a[i], stage, warp_m * kWarpM + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kFragmentsN; j += 2) {
        uint32_t r[4];
        B::load(r, stage + A::kBytes, warp_n * kWarpN + 8 * j, k);
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          ptx::mma_m16n8k16(sums[i][j], a[i], {r[0], r[2]}, T{});
          ptx::mma_m16n8k16(sums[i][j + 1], a[i], {r[1], r[3]}, T{});
        }
      }
    }
  }

  static FASTNN_DEVICE void run(const LinearMma& p) {
    unsigned char* const shared = ptx::dynamic_shared();
    const int warp = static_cast<int>(threadIdx.x) / 32, warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;
    const TilePlace place = tile_place(blockIdx.x, p.tiles_m, p.tiles_n);
    const int64_t m = place.m * tile.m, n = place.n * tile.n;
    const int split = static_cast<int>(blockIdx.y);
    const int64_t k_begin = split * p.k_per_split;
    const int64_t k_left = p.K - k_begin < p.k_per_split ? p.K - k_begin : p.k_per_split;
    const int steps = static_cast<int>((k_left + tile.k - 1) / tile.k);

    const auto load_step = [&](int step) {
      if (step < steps) {
        unsigned char* const stage = shared + step % kStages * kStageBytes;
        A::copy(stage, p.a, m, k_begin + int64_t{step} * tile.k);
        B::copy(stage + A::kBytes, p.b, n, k_begin + int64_t{step} * tile.k);
      }
      ptx::cp_async_commit();  // an empty group where there was no step, so that the count of groups stays in step
    };

    float sums[kFragmentsM][kFragmentsN][4] = {};
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load_step(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this step's tiles are there for all, and all have read those that the next load replaces
      load_step(step + kStages - 1);
      multiply(sums, shared + step % kStages * kStageBytes, warp_m, warp_n);
    }
    ptx::cp_async_wait<0>();

    linear_finish_fragments<T, tile.n, tile.threads, kWarpsM>(p.epilogue, m, n, split, reinterpret_cast<float*>(shared),
                                                              sums, warp_m, warp_n * kWarpN);
  }
};

template <class T, int TILE, bool A_ALONG_K, bool B_ALONG_K>
__global__ void __launch_bounds__(kMmaTiles[TILE].threads, kArch >= 800 ? 2 : 1)
    linear_mma_kernel(__grid_constant__ const LinearMma p) {
  LinearMmaKernel<T, TILE, A_ALONG_K, B_ALONG_K>::run(p);
}

}  // namespace fastnn::cuda

// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias) for few rows in float16 and bfloat16: the weight B is streamed once.
//
// The weight is the M side of m16n8k16 and the rows of A its N side. A block makes 32 features of up to 16 or 32 rows,
// or 64 of up to 64, with four warps: a warp has 32 features, all rows, and 32 of each step's 128 (64) elements of K;
// its share is added to those of the other warps, in their order, at the end. Steps of 8 KiB of the weight, with the
// same elements of the rows, come by cp.async through a ring of five or six stages. Rows of A lie with K dense, the
// weight with either dimension.
//
// Floor: 2 N K bytes of the weight at the bandwidth of memory, M FLOP for each: at an H200's 4.1 TB/s 64 rows are 260
// TFLOP/s. To keep memory busy each of 132 multiprocessors needs some 30 KiB on their way (36 bytes a ns, 800 ns): a
// block has 32 or 40 KiB of the weight, and two or three blocks fit. Shared memory is written and read 320 cycles a step
// at 64 rows, where memory brings one in 390. Features are few so that a layer of 4096 has a block for each
// multiprocessor with no splits, whose sums would cost a second launch; the price is that every block reads the rows of
// A from L2: half as many bytes as of the weight for 16 rows, as many for 32 and 64. No figure: not yet measured on a
// GPU.
#pragma once

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/linear_sm80.cuh"

namespace fastnn::cuda {

template <class T, int TILE, bool B_ALONG_K>
struct LinearThinKernel {
  static constexpr LinearTile tile = kThinTiles[TILE];
  static constexpr int kStages = TILE == 0 ? 6 : 5, kFeatureWarps = tile.n / 32, kShares = tile.k / 32;
  static constexpr int kPairs = tile.m / 16;  // of fragments of eight rows
  using Weight = OperandTile<tile.n, B_ALONG_K, tile.threads, tile.k>;
  using Rows = OperandTile<tile.m, true, tile.threads, tile.k>;
  static constexpr int kStageBytes = Weight::kBytes + Rows::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kFeatureWarps * kShares == tile.threads / 32);
  static_assert(tile.m * tile.n * 4 <= kSharedBytes);

  static FASTNN_DEVICE void run(const LinearMma& p) {
    unsigned char* const shared = ptx::dynamic_shared();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int feature = warp % kFeatureWarps * 32, share = warp / kFeatureWarps;
    const TilePlace place = tile_place(blockIdx.x, p.tiles_m, p.tiles_n);
    const int64_t m = place.m * tile.m, n = place.n * tile.n;
    const int split = static_cast<int>(blockIdx.y);
    const int64_t k_begin = split * p.k_per_split;
    const int64_t k_left = p.K - k_begin < p.k_per_split ? p.K - k_begin : p.k_per_split;
    const int steps = static_cast<int>((k_left + tile.k - 1) / tile.k);

    const auto load_step = [&](int step) {
      if (step < steps) {
        unsigned char* const stage = shared + step % kStages * kStageBytes;
        Weight::copy(stage, p.b, n, k_begin + int64_t{step} * tile.k);
        Rows::copy(stage + Weight::kBytes, p.a, m, k_begin + int64_t{step} * tile.k);
      }
      ptx::cp_async_commit();  // an empty group where there was no step, so that the count of groups stays in step
    };

    float sums[2][kPairs][2][4] = {};
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load_step(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this step's tiles are there for all, and all have read those that the next load replaces
      load_step(step + kStages - 1);
      const unsigned char* const stage = shared + step % kStages * kStageBytes;
#pragma unroll
      for (int k = 32 * share; k < 32 * share + 32; k += 16) {
        uint32_t weight[2][4];
#pragma unroll
        for (int f = 0; f < 2; ++f) Weight::load(weight[f], stage, feature + 16 * f, k);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          uint32_t r[4];
          Rows::load(r, stage + Weight::kBytes, 16 * i, k);
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            ptx::mma_m16n8k16(sums[f][i][0], weight[f], {r[0], r[2]}, T{});
            ptx::mma_m16n8k16(sums[f][i][1], weight[f], {r[1], r[3]}, T{});
          }
        }
      }
    }
    ptx::cp_async_wait<0>();

    // Fragments hold features by rows: turned on their way through shared memory.
    float* const staging = reinterpret_cast<float*>(shared);
#pragma unroll 1
    for (int turn = 0; turn < kShares; ++turn) {
      __syncthreads();
      if (share == turn) {
#pragma unroll
        for (int f = 0; f < 2; ++f)
#pragma unroll
          for (int i = 0; i < kPairs; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int row = 16 * i + 8 * h + lane % 4 * 2 + e % 2;
                const int col = feature + 16 * f + e / 2 * 8 + lane / 4;
                float* const at = staging + staged<tile.n>(row, col);
                const float sum = sums[f][i][h][e];
                ptx::shared_store(at, turn == 0 ? sum : ptx::shared_load<float>(at) + sum);
              }
      }
    }
    __syncthreads();
    linear_finish_tile<T, tile.m, tile.n, tile.threads>(p.epilogue, m, n, split, staging);
  }
};

template <class T, int TILE, bool B_ALONG_K>
__global__ void __launch_bounds__(kThinTiles[TILE].threads, 2) linear_thin_kernel(__grid_constant__ const LinearMma p) {
  if constexpr (kArch >= 800)
    LinearThinKernel<T, TILE, B_ALONG_K>::run(p);
  else
    ptx::trap();
}

}  // namespace fastnn::cuda

// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias) in float16 and bfloat16 on wgmma of sm_90a, sums in float.
//
// A block has three warpgroups and stays for as many tiles as fall to it. One thread of the first loads: tiles of
// 128x256 or 128x128 and 64 along K by TMA, through a ring of four or six stages (192 KiB) that two mbarriers a stage
// keep in step: full (the bytes have come) and empty (all eight consuming warps are done with it). The other two
// multiply, 64 rows of the tile each, one batch of four wgmma in flight behind the one that is issued, and hold the
// sums in registers, which the loading warpgroup gives up to them. Either operand may lie with K or with its other
// dimension dense: the descriptors say which. TMA fills with zeros past the end of M, N and K; what it cannot describe
// stays with linear_sm80.cuh. The next tile's loads run while sums leave: each warp stages its 16 rows, 64 columns at a
// time, in 4 KiB of its own. Tiles go in groups of sixteen rows, so that those of a wave are near a square of L2. With
// splits a block's work is a tile and a share of K, and the sums go to linear_reduce_kernel.
//
// Floor: 2 M N K flops at 4096 a cycle and multiprocessor; a step of the large tile, 1024 cycles of multiply-adds,
// reads 48 KiB from L2, 48 bytes a cycle, and from shared memory 80 of 128 bytes a cycle. No figure: not yet measured
// on a GPU. Source: PTX ISA 9.0, 9.7.15; the warp-specialised persistent pipeline is the one CUTLASS's documentation
// describes.
#pragma once

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tile.cuh"

namespace fastnn::cuda {

struct LinearWgmma {
  TensorMap a;  // [M, K], or [K, M] where A lies with M dense; boxes of 64 elements in its dense direction
  TensorMap b;  // [N, K], or [K, N]
  int64_t K, k_per_split;
  int64_t tiles_m, tiles_n, work;  // work: tiles times splits
  LinearEpilogue epilogue;
};

// An operand's tile in shared memory: SIDE rows of 64 elements of K, or groups of 64 of SIDE, each 64 rows along K.
template <int SIDE, bool ALONG_K>
struct WgmmaTile {
  static constexpr int kBytes = SIDE * 64 * 2, kGroupBytes = 64 * 128;

  static FASTNN_DEVICE void load(unsigned char* tile, const TensorMap* map, uint64_t* full, int side, int k) {
    if constexpr (ALONG_K) {
      ptx::tma_load(tile, map, full, {k, side});
    } else {
#pragma unroll
      for (int group = 0; group < SIDE / 64; ++group)
        ptx::tma_load(tile + group * kGroupBytes, map, full, {side + 64 * group, k});
    }
  }

  // Of 16 elements along K, from `side`, a multiple of 64.
  static FASTNN_DEVICE uint64_t descriptor(const unsigned char* tile, int side, int k) {
    return ptx::wgmma_descriptor(tile + side * 128 + (ALONG_K ? k * 2 : k * 128), kGroupBytes, 1024);
  }
};

template <class T, int TILE, bool A_ALONG_K, bool B_ALONG_K>
struct LinearWgmmaKernel {
  static constexpr LinearTile tile = kWgmmaTiles[TILE];
  static constexpr int kStages = TILE == 0 ? 4 : 6, kConsumers = 8;
  using A = WgmmaTile<tile.m, A_ALONG_K>;
  using B = WgmmaTile<tile.n, B_ALONG_K>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kCols = 64, kStagingBytes = 16 * kCols * 4;  // of a warp
  static constexpr int kBarriers = kStages * kStageBytes + kConsumers * kStagingBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(tile.m == 128 && tile.k == 64 && tile.threads == 384 && kSharedBytes <= 232448);

  // Where the ring stands: the stage, and how often it went round, modulo 2.
  struct Ring {
    int stage = 0, parity = 0;
    FASTNN_DEVICE void next() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  struct Work {
    int m, n, split, k, steps;
  };
  static FASTNN_DEVICE Work work_at(const LinearWgmma& p, int64_t index) {
    const int64_t tiles = p.tiles_m * p.tiles_n;
    const TilePlace place = tile_place(index % tiles, p.tiles_m, p.tiles_n, 16);
    const int64_t split = index / tiles, k = split * p.k_per_split;
    const int64_t k_left = p.K - k < p.k_per_split ? p.K - k : p.k_per_split;
    return {static_cast<int>(place.m * tile.m), static_cast<int>(place.n * tile.n), static_cast<int>(split),
            static_cast<int>(k), static_cast<int>((k_left + tile.k - 1) / tile.k)};
  }

  static FASTNN_DEVICE void load(const LinearWgmma& p, unsigned char* shared, uint64_t* full, uint64_t* empty) {
    Ring ring;
    for (int64_t index = blockIdx.x; index < p.work; index += gridDim.x) {
      const Work work = work_at(p, index);
#pragma unroll 1
      for (int step = 0; step < work.steps; ++step, ring.next()) {
        ptx::mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
        ptx::mbarrier_arrive_expect(full + ring.stage, kStageBytes);
        unsigned char* const stage = shared + ring.stage * kStageBytes;
        const int k = work.k + step * tile.k;
        A::load(stage, &p.a, full + ring.stage, work.m, k);
        B::load(stage + A::kBytes, &p.b, full + ring.stage, work.n, k);
      }
    }
  }

  // The 16 rows of this warp from (m, n) on, behind wgmma_wait.
  static FASTNN_DEVICE void finish(const LinearEpilogue& e, const float (&sums)[tile.n / 2], int64_t m, int64_t n,
                                   int split, float* staging) {
    constexpr int W = kLanes<T>;
    const int lane = static_cast<int>(threadIdx.x) % 32, col = lane % (kCols / W) * W;
    LinearEpilogue rest = e;
    rest.bias = nullptr;  // a thread has the same columns in all rows of a pass: it reads them once
#pragma unroll 1
    for (int pass = 0; pass < tile.n / kCols; ++pass) {
      __syncwarp();  // nobody reads what is overwritten now
#pragma unroll
      for (int q = 0; q < tile.n / kCols; ++q)
        if (q == pass) {
#pragma unroll
          for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float* const pair = sums + q * kCols / 2 + 4 * j + 2 * half;
              ptx::shared_store(staging + staged<kCols>(8 * half + lane / 4, 8 * j + lane % 4 * 2),
                                Vector<float, 2>{{pair[0], pair[1]}});
            }
        }
      __syncwarp();
      const int64_t to_n = n + pass * kCols + col;
      const int count = static_cast<int>(e.N - to_n < W ? e.N - to_n : W);
      float bias[W] = {};
      if (e.bias && !e.partial) {
#pragma unroll
        for (int i = 0; i < W; ++i)
          if (i < count) bias[i] = widen(static_cast<const T*>(e.bias)[to_n + i]);
      }
#pragma unroll 1
      for (int row = lane / (kCols / W); row < 16; row += 32 / (kCols / W)) {
        const int64_t to_m = m + row;
        if (to_m >= e.M || count <= 0) break;
        Vector<float, 4> parts[W / 4];
#pragma unroll
        for (int i = 0; i < W / 4; ++i)
          parts[i] = ptx::shared_load<Vector<float, 4>>(staging + staged<kCols>(row, col + 4 * i));
        if (e.partial) {
          float* const to = static_cast<float*>(e.partial) + (split * e.M + to_m) * e.N + to_n;
#pragma unroll
          for (int i = 0; i < W / 4; ++i)
            if (4 * i < count) store_row(to + 4 * i, parts[i], count - 4 * i < 4 ? count - 4 * i : 4, e.N % 4 == 0);
        } else {
          Vector<float, W> values;
#pragma unroll
          for (int i = 0; i < W; ++i) values.data[i] = parts[i / 4].data[i % 4] + bias[i];
          linear_finish<T, W>(rest, to_m, to_n, count, values);
        }
      }
    }
  }

  static FASTNN_DEVICE void multiply(const LinearWgmma& p, unsigned char* shared, uint64_t* full, uint64_t* empty) {
    const int warp = static_cast<int>(threadIdx.x) / 32 - 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int first = warp / 4 * 64;  // row of this warpgroup
    float* const staging = reinterpret_cast<float*>(shared + kStages * kStageBytes + warp * kStagingBytes);
    Ring ring;
    for (int64_t index = blockIdx.x; index < p.work; index += gridDim.x) {
      const Work work = work_at(p, index);
      float sums[tile.n / 2];
      int before = 0;
#pragma unroll 1
      for (int step = 0; step < work.steps; ++step, ring.next()) {
        const unsigned char* const stage = shared + ring.stage * kStageBytes;
        ptx::mbarrier_wait(full + ring.stage, ring.parity);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < tile.k; k += 16)
          ptx::wgmma<tile.n, A_ALONG_K, B_ALONG_K>(sums, A::descriptor(stage, first, k),
                                                   B::descriptor(stage + A::kBytes, 0, k), T{}, step > 0 || k > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the step before this one has read its stage
        if (step > 0 && lane == 0) ptx::mbarrier_arrive(empty + before);
        before = ring.stage;
      }
      ptx::wgmma_wait<0>(sums);
      if (lane == 0) ptx::mbarrier_arrive(empty + before);
      finish(p.epilogue, sums, int64_t{work.m} + first + warp % 4 * 16, work.n, work.split, staging);
    }
  }

  static FASTNN_DEVICE void run(const LinearWgmma& p) {
    unsigned char* const shared = ptx::dynamic_shared();
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + kBarriers);
    uint64_t* const empty = full + kStages;
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&p.a), ptx::prefetch_tensor_map(&p.b);
      for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(full + i, 1), ptx::mbarrier_init(empty + i, kConsumers);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      ptx::registers_drop<40>();
      if (threadIdx.x == 0) load(p, shared, full, empty);
    } else {
      ptx::registers_add<232>();
      multiply(p, shared, full, empty);
    }
  }
};

template <class T, int TILE, bool A_ALONG_K, bool B_ALONG_K>
__global__ void __launch_bounds__(kWgmmaTiles[TILE].threads, 1)
    linear_wgmma_kernel(__grid_constant__ const LinearWgmma p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTNN_CUDA_SHIM)
  LinearWgmmaKernel<T, TILE, A_ALONG_K, B_ALONG_K>::run(p);
#endif
}

}  // namespace fastnn::cuda

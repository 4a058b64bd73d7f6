// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias) in float32 on the TF32 tensor cores: in full precision as three products, or,
// where the caller allows TF32, as one.
//
// Three products: a = high + low, high the nearest TF32, low = a - high; a b = low high + high low + high high, less
// some 2^-23 of a b. Tensor cores cut their sums where they should round, so each step of eight along K starts from zero
// and is added to the sums by FADD. In a model that cuts the addends of every four products, as chips were found to do,
// the root mean square error is 0.3 to 0.65 of that of FMAs in order for K from 128 to 32768, and 1 to 2 below 64.
//
// What three products cannot do, FMAs do: with infinities, NaN, magnitudes whose products could overflow, or tiny ones
// whose low parts get lost where a sum shows it, a block makes its tile again from the same ring. Slow, rare, right.
//
// Tiles of 128x128 with 8 warps of 64x32, or of 64x64 with 4 of 32x32, in steps of 32 along K, by cp.async through three
// stages (96 or 48 KiB). K dense: ldmatrix, which moves pairs of 16-bit elements and so floats; else loads of 4 bytes.
//
// Floor: 6 M N K FLOP at the TF32 rate (2 M N K where TF32 is allowed), or 4 (M K + N K + M N) bytes. A warp's step of
// eight is 48 mma (16), 24 splits of three instructions, 64 FADDs: on 9.0 192 cycles of tensor cores to some 220 of
// issue, on 8.0 384 to 220. Ceilings: 52 TFLOP/s on 8.0, some 100 on 9.0, where FMAs have 19 and 67. No figure: not yet
// measured on a GPU. Source: PTX ISA, fragments of m16n8k8; Ootomo and Yokota, Recovering single precision accuracy from
// Tensor Cores while surpassing the FP32 theoretical peak performance, 2022.
#pragma once

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/linear_sm80.cuh"

namespace fastnn::cuda {

// A tile of floats in shared memory: SIDE rows of 32 elements of K, or 32 rows of SIDE elements. The matrix counts in
// halves of floats.
template <int SIDE, bool ALONG_K, int THREADS>
struct WordTile {
  static constexpr int kRows = ALONG_K ? SIDE : 32, kChunks = (ALONG_K ? 32 : SIDE) / 4, kBytes = SIDE * 32 * 4;

  static FASTNN_HOST_DEVICE constexpr int place(int row, int chunk) {
    if constexpr (ALONG_K)
      return swizzled<kChunks>(row, chunk);
    else
      return swizzled_words<kChunks>(row, chunk);
  }

  static FASTNN_DEVICE void copy(unsigned char* tile, const RowMatrix& matrix, int64_t side, int64_t k) {
    copy_tile<kRows, kChunks, THREADS, place, 4>(tile, matrix, ALONG_K ? side : k, 2 * (ALONG_K ? k : side));
  }

  static FASTNN_DEVICE uint32_t element(const unsigned char* tile, int side, int k) {
    const int row = ALONG_K ? side : k, col = ALONG_K ? k : side;
    return ptx::shared_load<uint32_t>(tile + 16 * place(row, col / 4) + 4 * (col % 4));
  }

  // Elements (side + g, k + t), (side + 8 + g, k + t), (side + g, k + 4 + t), (side + 8 + g, k + 4 + t).
  static FASTNN_DEVICE void load(uint32_t (&r)[4], const unsigned char* tile, int side, int k) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (ALONG_K) {
      ptx::ldmatrix_x4(r, tile + 16 * place(side + lane % 16, k / 4 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = element(tile, side + i % 2 * 8 + lane / 4, k + i / 2 * 4 + lane % 4);
    }
  }
};

// The nearest TF32, ties away from zero, as mma sees it: it drops the last 13 bits. Not for NaN, whose bits may run
// over.
FASTNN_DEVICE uint32_t nearest_tf32(uint32_t bits) { return bits + 0x1000; }

// What there is among some floats, by few instructions: infinities, NaN, huge and tiny magnitudes.
struct Magnitudes {
  float sum = 0;         // of all of them: no less than the largest, up to rounding
  uint32_t least = ~0u;  // the bits of the smallest that is not zero, twice (which drops the sign), less one

  FASTNN_DEVICE void see(uint32_t bits) {
    sum += ::fabsf(bitcast<float>(bits));
    least = bits + bits - 1 < least ? bits + bits - 1 : least;  // zero less one is the largest of all
  }
  FASTNN_DEVICE void see(const Magnitudes& other) {
    sum += other.sum, least = other.least < least ? other.least : least;
  }
  // Some low part may be below the smallest normal float, 2^-126, of which tensor cores keep few bits or none.
  FASTNN_DEVICE bool tiny() const { return least < 2 * bitcast<uint32_t>(0x1p-100f) - 1; }
};

template <int TILE, bool A_ALONG_K, bool B_ALONG_K, bool THREE>
struct LinearTf32Kernel {
  static constexpr LinearTile tile = kTf32Tiles[TILE];
  static constexpr int kStages = 3, kWarps = tile.threads / 32, kWarpsM = 2, kWarpsN = kWarps / kWarpsM;
  static constexpr int kWarpM = tile.m / kWarpsM, kWarpN = tile.n / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  using A = WordTile<tile.m, A_ALONG_K, tile.threads>;
  using B = WordTile<tile.n, B_ALONG_K, tile.threads>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kUnroll = kArch <= 900 ? 2 : 1;  // steps of eight that overlap, as far as registers last
  static_assert(kWarpM * tile.n * 4 <= kSharedBytes, "the epilogue stages one row of warps at a time");
  static_assert(tile.k == 32 && kFragmentsN % 2 == 0);
  using Sums = float[kFragmentsM][kFragmentsN][4];

  struct Warp {
    int m, n;  // its place among the warps
  };

  static FASTNN_DEVICE void multiply(Sums& sums, const unsigned char* stage, Warp warp) {
#pragma unroll kUnroll
    for (int k = 0; k < tile.k; k += 8) {
      uint32_t a[kFragmentsM][4], a_low[kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        A::load(a[i], stage, warp.m * kWarpM + 16 * i, k);
        split(a[i], a_low[i]);
      }
#pragma unroll
      for (int j = 0; j < kFragmentsN; j += 2) {
        uint32_t b[4], b_low[4];
        B::load(b, stage + A::kBytes, warp.n * kWarpN + 8 * j, k);
        split(b, b_low);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (THREE) {
            float fresh[kFragmentsM][4] = {};
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) ptx::mma_m16n8k8_tf32(fresh[i], a_low[i], {b[h], b[h + 2]});
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) ptx::mma_m16n8k8_tf32(fresh[i], a[i], {b_low[h], b_low[h + 2]});
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) ptx::mma_m16n8k8_tf32(fresh[i], a[i], {b[h], b[h + 2]});
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[i][j + h][e] += fresh[i][e];
          } else {
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) ptx::mma_m16n8k8_tf32(sums[i][j + h], a[i], {b[h], b[h + 2]});
          }
        }
      }
    }
  }

  // A thread looks at its share of both tiles.
  static FASTNN_DEVICE void note(Magnitudes (&seen)[2], const unsigned char* stage) {
    constexpr int kEach = A::kBytes / 16 / tile.threads;
    static_assert(A::kBytes == B::kBytes);
#pragma unroll
    for (int operand = 0; operand < 2; ++operand)
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const auto words = ptx::shared_load<Vector<uint32_t, 4>>(
            stage + operand * A::kBytes + 16 * (static_cast<int>(threadIdx.x) + i * tile.threads));
#pragma unroll
        for (int e = 0; e < 4; ++e) seen[operand].see(words.data[e]);
      }
  }

  static FASTNN_DEVICE void split(uint32_t (&bits)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t high = nearest_tf32(bits[e]) & ~0x1fffu;
      if constexpr (THREE) low[e] = bitcast<uint32_t>(bitcast<float>(bits[e]) - bitcast<float>(high));
      bits[e] = THREE ? high : nearest_tf32(bits[e]);
    }
  }

  // The same sums, by FMA.
  static FASTNN_DEVICE void multiply_plainly(Sums& sums, const unsigned char* stage, Warp warp) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int k = 0; k < tile.k; ++k) {
      float b[kFragmentsN][2];
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[j][e] = bitcast<float>(B::element(stage + A::kBytes, warp.n * kWarpN + 8 * j + lane % 4 * 2 + e, k));
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = bitcast<float>(A::element(stage, warp.m * kWarpM + 16 * i + 8 * half + lane / 4, k));
#pragma unroll
          for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[i][j][2 * half + e] = ::fmaf(a, b[j][e], sums[i][j][2 * half + e]);
        }
    }
  }

  // Whether the tensor cores' sums are as good as those of FMAs; the same answer for all threads. Nobody reads `shared`
  // any more when it is called, behind a barrier.
  static FASTNN_DEVICE bool good(const Sums& sums, Magnitudes (&seen)[2], int64_t rows_left, int64_t cols_left,
                                 unsigned char* shared, Warp warp) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    using Notes = Vector<Magnitudes, 2>;
    Notes* const notes = reinterpret_cast<Notes*>(shared);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2)
        seen[i].see(
            {__shfl_xor_sync(0xffffffffu, seen[i].sum, apart), __shfl_xor_sync(0xffffffffu, seen[i].least, apart)});
    if (lane == 0) ptx::shared_store(notes + warp.m * kWarpsN + warp.n, Notes{{seen[0], seen[1]}});
    __syncthreads();
    Magnitudes a, b;
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) {
      const Notes note = ptx::shared_load<Notes>(notes + i);
      a.see(note.data[0]), b.see(note.data[1]);
    }
    // Where a sum of magnitudes is far from the largest float, no operand is infinite, NaN or rounds to infinity.
    if (!(a.sum < 0x1p126f) || !(b.sum < 0x1p126f) || !(a.sum * b.sum < 0x1p126f)) return false;
    if (!THREE || (!a.tiny() && !b.tiny())) return true;
    // The most that can be lost, 2^-126 of a tiny factor times the other, against half an ulp of each sum.
    const float lost = 0x1p-125f * ((a.tiny() ? b.sum : 0.0f) + (b.tiny() ? a.sum : 0.0f));
    int lossy = 0;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp.m * kWarpM + 16 * i + e / 2 * 8 + lane / 4;
          const int col = warp.n * kWarpN + 8 * j + lane % 4 * 2 + e % 2;
          lossy |= row < rows_left && col < cols_left && ::fabsf(sums[i][j][e]) * 0x1p-24f < lost;
        }
    lossy = __any_sync(0xffffffffu, lossy);
    __syncthreads();
    uint32_t* const votes = reinterpret_cast<uint32_t*>(shared);
    if (lane == 0) ptx::shared_store<uint32_t>(votes + warp.m * kWarpsN + warp.n, lossy);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) lossy |= static_cast<int>(ptx::shared_load<uint32_t>(votes + i));
    return !lossy;
  }

  static FASTNN_DEVICE void run(const LinearMma& p) {
    unsigned char* const shared = ptx::dynamic_shared();
    const int index = static_cast<int>(threadIdx.x) / 32;
    const Warp warp = {index / kWarpsN, index % kWarpsN};
    const TilePlace place = tile_place(blockIdx.x, p.tiles_m, p.tiles_n);
    const int64_t m = place.m * tile.m, n = place.n * tile.n;
    const int split = static_cast<int>(blockIdx.y);
    const int64_t k_begin = split * p.k_per_split;
    const int64_t k_left = p.K - k_begin < p.k_per_split ? p.K - k_begin : p.k_per_split;
    const int steps = static_cast<int>((k_left + tile.k - 1) / tile.k);

    Sums sums;
    const auto add_up = [&](const auto& step_of) {
      const auto load_step = [&](int step) {
        if (step < steps) {
          unsigned char* const stage = shared + step % kStages * kStageBytes;
          A::copy(stage, p.a, m, k_begin + int64_t{step} * tile.k);
          B::copy(stage + A::kBytes, p.b, n, k_begin + int64_t{step} * tile.k);
        }
        ptx::cp_async_commit();  // an empty group where there was no step, so that the count of groups stays in step
      };
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
#pragma unroll
      for (int step = 0; step < kStages - 1; ++step) load_step(step);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this step's tiles are there for all, and all have read those that the next load replaces
        load_step(step + kStages - 1);
        step_of(shared + step % kStages * kStageBytes);
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // nobody reads the ring any more
    };

    Magnitudes seen[2];
    add_up([&](const unsigned char* stage) {
      note(seen, stage);
      multiply(sums, stage, warp);
    });
    if (!good(sums, seen, p.epilogue.M - m, p.epilogue.N - n, shared, warp)) {
      __syncthreads();
      add_up([&](const unsigned char* stage) { multiply_plainly(sums, stage, warp); });
    }
    linear_finish_fragments<float, tile.n, tile.threads, kWarpsM>(
        p.epilogue, m, n, split, reinterpret_cast<float*>(shared), sums, warp.m, warp.n * kWarpN);
  }
};

template <int TILE, bool A_ALONG_K, bool B_ALONG_K, bool THREE>
__global__ void __launch_bounds__(kTf32Tiles[TILE].threads, TILE == 0 ? 1 : 3)
    linear_tf32_kernel(__grid_constant__ const LinearMma p) {
  if constexpr (kArch >= 800)
    LinearTf32Kernel<TILE, A_ALONG_K, B_ALONG_K, THREE>::run(p);
  else
    ptx::trap();
}

}  // namespace fastnn::cuda

// Which kernel serves a linear, with which tile, in how many splits along K: arithmetic on the shape and on the chip's
// number of multiprocessors. Everything is constexpr; tests/cuda_host sweeps it.
#pragma once

#include <cstdint>

#include "fastnn/types.h"

namespace fastnn::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Gemv: a few rows, the weight is streamed once. Mma: tensor cores, 16-bit types. Simt: everything else. Tf32, Tf32x3:
// float32 on tensor cores, in one product or in three. Thin: up to 64 rows in 16-bit types, the weight is streamed once.
// Wgmma: 16-bit types on sm_90 that TMA can describe.
enum class LinearKernel : int32_t { Gemv, Mma, Simt, Tf32, Tf32x3, Thin, Wgmma };

struct LinearTile {
  int m, n, k, threads;
};
inline constexpr LinearTile kMmaTiles[] = {{128, 128, 32, 256}, {64, 64, 32, 128}};
inline constexpr LinearTile kTf32Tiles[] = {{128, 128, 32, 256}, {64, 64, 32, 128}};
inline constexpr LinearTile kThinTiles[] = {{16, 32, 128, 128}, {32, 32, 128, 128}, {64, 64, 64, 128}};
inline constexpr LinearTile kSimtTiles[] = {{128, 128, 8, 256}, {64, 64, 8, 256}};
inline constexpr LinearTile kWgmmaTiles[] = {{128, 256, 64, 384}, {128, 128, 64, 384}};
inline constexpr LinearTile kGemvTile = {8, 16, 128, 128};

struct LinearPlan {
  LinearKernel kernel;
  int tile;             // index into the kernel's tiles
  int splits;           // partial sums, added up in their order by a second kernel
  int64_t k_per_split;  // a multiple of the tile's k
};

constexpr LinearTile linear_tile(LinearKernel kernel, int tile) {
  switch (kernel) {
    case LinearKernel::Mma: return kMmaTiles[tile];
    case LinearKernel::Simt: return kSimtTiles[tile];
    case LinearKernel::Tf32:
    case LinearKernel::Tf32x3: return kTf32Tiles[tile];
    case LinearKernel::Thin: return kThinTiles[tile];
    case LinearKernel::Wgmma: return kWgmmaTiles[tile];
    case LinearKernel::Gemv: break;
  }
  return kGemvTile;
}

// Splits of equal size, none of them empty: `wanted` or a few less.
constexpr LinearPlan linear_split(LinearKernel kernel, int tile, int64_t K, int wanted) {
  const int64_t k = linear_tile(kernel, tile).k, steps = ceil_div(K, k);
  const int64_t each = steps < 1 ? 1 : ceil_div(steps, wanted < 1 ? 1 : wanted);
  return {kernel, tile, steps < 1 ? 1 : static_cast<int>(ceil_div(steps, each)), each * k};
}

constexpr int64_t linear_partial_bytes(DType dtype, int64_t M, int64_t N, int splits) {
  return splits > 1 ? splits * M * N * (dtype == DType::Float64 ? 8 : 4) : 0;
}

struct LinearProblem {
  DType dtype;
  int64_t M, N, K;
  bool a_unit, b_unit;  // rows or columns of the operand lie dense in memory
  bool along_k;         // and in both it is the direction of K
  bool allow_tf32 = false;
  bool a_along_k = false;  // in A it is, whatever it is in B
  bool tma = false;        // both are such as TMA can describe
};

// Multiprocessor cycles that a plan is thought to take. A step of the main loop is bound by its multiply-adds or by the
// bytes of its two tiles from L2 (48 a cycle); the smaller tile reads more shared memory for a multiply-add, which the
// factor says. A tile takes some 1000 cycles to come, and a block has two steps on their way, up to four blocks being
// there at once. Thin has four or more, two blocks being there, and enough in all to be bound by memory, of which the
// chip has 16 bytes a cycle for each multiprocessor, whoever asks. A block costs its first loads and its epilogue, a
// split the way of its sums through memory and one more launch. None of the constants was fitted: they are ratios of
// data sheets.
constexpr double linear_cost(const LinearProblem& p, const LinearPlan& plan, int multiprocessors) {
  const LinearTile t = linear_tile(plan.kernel, plan.tile);
  const bool wide = p.dtype == DType::Float64;
  const bool thin = plan.kernel == LinearKernel::Thin, wgmma = plan.kernel == LinearKernel::Wgmma;
  const double peak = wgmma                                      ? 2048
                      : thin || plan.kernel == LinearKernel::Mma ? 1024
                      : plan.kernel == LinearKernel::Tf32        ? 512
                      : plan.kernel == LinearKernel::Tf32x3      ? 512 / 3.0
                      : wide                                     ? 32
                                                                 : 128;
  const double rate = peak * (plan.tile == 0 || thin ? 0.8 : wgmma ? 0.7 : 0.5);  // multiply-adds a cycle
  const double size = p.dtype == DType::Float64 ? 8 : p.dtype == DType::Float32 ? 4 : 2;
  const double products = static_cast<double>(t.m) * t.n * t.k / rate, bytes = (t.m + t.n) * t.k * size / 48;
  const double steps = static_cast<double>(plan.k_per_split / t.k);
  const int64_t blocks = ceil_div(p.M, t.m) * ceil_div(p.N, t.n) * plan.splits;
  const double waves = static_cast<double>(ceil_div(blocks, multiprocessors));
  const double sums =
      plan.splits > 1 ? 4000 + 2.0 * plan.splits * p.M * p.N * (wide ? 8 : 4) / (24.0 * multiprocessors) : 0;
  const double busy = products > bytes ? products : bytes;
  if (thin) {
    const double memory = blocks * (t.n * t.k * size) / (16.0 * multiprocessors);
    const double waiting = 250.0 * static_cast<double>(ceil_div(blocks, 2 * multiprocessors));
    const double longest = waves * busy > waiting ? waves * busy : waiting;
    return steps * (memory > longest ? memory : longest) + 2000 + sums;
  }
  const double waiting = 500 / (waves < 4 ? waves : 4);
  return waves * (steps * (busy > waiting ? busy : waiting) + 2000) + sums;
}

// float32 on tensor cores: in three products where TF32 is more than six times as fast as FMAs (8.0: 8 times, 9.0: 7,
// 10.x: 14, by data sheets) and K is long enough to matter (below, memory is the bound and FMAs err less), in one, if
// that is allowed, wherever there is TF32 (twice as fast elsewhere, or as fast).
constexpr LinearKernel float_kernel(const LinearProblem& p, int capability) {
  const bool fast = capability == 80 || capability == 90 || capability / 10 == 10;
  if (p.dtype != DType::Float32 || !p.a_unit || !p.b_unit || capability < 80) return LinearKernel::Simt;
  return p.allow_tf32 ? LinearKernel::Tf32 : fast && p.K >= 64 ? LinearKernel::Tf32x3 : LinearKernel::Simt;
}

inline constexpr int64_t kMostPartialBytes = int64_t{32} << 20;

constexpr LinearPlan linear_plan(const LinearProblem& p, int capability, int multiprocessors) {
  const bool half = p.dtype == DType::Float16 || p.dtype == DType::BFloat16;
  const bool mma = half && p.a_unit && p.b_unit && (capability >= 80 || p.dtype == DType::Float16);
  const auto fits = [&](int splits) {
    return splits == 1 || linear_partial_bytes(p.dtype, p.M, p.N, splits) <= kMostPartialBytes;
  };
  if (p.M <= kGemvTile.m && p.along_k && (!half || mma)) {
    // Four blocks to a multiprocessor keep enough loads in flight; a split has at least four steps.
    const int64_t blocks = ceil_div(p.N, kGemvTile.n), most = p.K / (4 * kGemvTile.k);
    const int64_t wanted = blocks > 0 ? 2 * multiprocessors / blocks : 1;
    const LinearPlan plan = linear_split(LinearKernel::Gemv, 0, p.K, static_cast<int>(wanted < most ? wanted : most));
    return fits(plan.splits) ? plan : linear_split(LinearKernel::Gemv, 0, p.K, 1);
  }
  const LinearKernel kernel = mma ? LinearKernel::Mma : float_kernel(p, capability);
  LinearPlan best = linear_split(kernel, 1, p.K, 1);
  double least = linear_cost(p, best, multiprocessors);
  const auto consider = [&](LinearKernel candidate, int tile) {
    const LinearTile t = linear_tile(candidate, tile);
    const int64_t blocks = ceil_div(p.M, t.m) * ceil_div(p.N, t.n);
    for (int wanted = 1; wanted <= 32; ++wanted) {
      if (wanted > 1 && (blocks * (wanted - 1) >= 2 * multiprocessors || p.K < int64_t{4} * wanted * t.k)) break;
      const LinearPlan plan = linear_split(candidate, tile, p.K, wanted);
      if (!fits(plan.splits)) break;
      const double cost = linear_cost(p, plan, multiprocessors);
      if (cost < least) least = cost, best = plan;
    }
  };
  for (int tile = p.dtype == DType::Float32 || mma ? 0 : 1; tile < 2; ++tile) consider(kernel, tile);
  if (mma && p.tma && capability == 90)
    for (const int tile : {0, 1}) consider(LinearKernel::Wgmma, tile);
  if (mma && capability >= 80 && p.a_along_k && p.M <= kThinTiles[2].m)
    consider(LinearKernel::Thin, p.M <= kThinTiles[0].m ? 0 : p.M <= kThinTiles[1].m ? 1 : 2);
  return best;
}

}  // namespace fastnn::cuda

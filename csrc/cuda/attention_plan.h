// Which kernel serves an attention, with which tile, in how many splits along the keys: arithmetic on the shape and on
// the chip. Everything is constexpr; tests/cuda_host sweeps it.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "fastnn/attention.h"

namespace fastnn::cuda {

// Mma: tensor cores, 16-bit types. Wgmma: those of sm_90a, for many queries. Simt: everything else.
enum class AttentionKernel : int32_t { Mma, Simt, Wgmma };

// `width`: of head_dim and of value_dim, padded with zeros. The four warps share the rows, or the keys of a step in
// four parts where rows are few. `general`: knows masks, soft cap and dropout.
struct AttentionTile {
  int width, rows, keys, warps_of_keys;
  bool general;
};
inline constexpr AttentionTile kAttentionTiles[] = {
    {32, 128, 64, 1, false}, {64, 128, 64, 1, false}, {96, 128, 32, 1, false}, {128, 128, 32, 1, false},
    {192, 64, 32, 1, false}, {256, 64, 32, 1, false}, {64, 128, 32, 1, true},  {128, 64, 64, 1, true},
    {256, 64, 32, 1, true},  {64, 16, 64, 4, true},   {128, 16, 64, 4, true},  {256, 16, 64, 4, true},
};
inline constexpr int kAttentionTileCount = 12, kAttentionThreads = 128;

// Tiles of sm_90a. `slots`: tiles of keys or of values in the ring, as many as a multiprocessor's 227 KiB hold beside the
// queries; at width 64, where eight are four steps ahead, no more. Two groups of four warps have 64 rows each.
struct AttentionWgmmaTile {
  int width, rows, keys, slots;
};
inline constexpr AttentionWgmmaTile kAttentionWgmmaTiles[] = {{64, 128, 128, 8}, {128, 128, 128, 6}, {256, 128, 64, 5}};
inline constexpr int kAttentionWgmmaTileCount = 3, kAttentionWgmmaThreads = 384;
// Behind the tiles: a pair of barriers a slot, and a pair for the queries.
constexpr int attention_wgmma_shared_bytes(const AttentionWgmmaTile& t) {
  return (t.rows + t.slots * t.keys) * t.width * 2 + (2 * t.slots + 2) * 8;
}

// Rows of the two tiles without tensor cores, keys of a step.
inline constexpr int kAttentionSimtRows[] = {64, 16}, kAttentionSimtKeys = 64, kAttentionSimtThreads = 256;

// Tiles of keys and of values in the ring: four where 64 KiB hold them, so that two blocks share a multiprocessor and
// sm_75 has room; else three, which is two blocks on sm_80, and on sm_75, where copies do not run ahead, what its 64
// KiB hold.
constexpr int attention_slots(const AttentionTile& t, int arch) {
  const int query = t.rows * t.width * 2, slot = t.keys * t.width * 2;
  if (query + 4 * slot <= 65536 || (t.warps_of_keys > 1 && t.width <= 128 && arch >= 800)) return 4;
  return query + 3 * slot <= 65536 || (t.warps_of_keys == 1 && arch >= 800) ? 3 : 2;
}
constexpr int attention_shared_bytes(const AttentionTile& t, int arch) {
  const int ring = attention_slots(t, arch) * t.keys * t.width * 2;
  const int merge = t.warps_of_keys > 1 ? 4 * t.rows * (t.width + 2) * 4 : 0;
  return t.rows * t.width * 2 + (ring > merge ? ring : merge);
}

// Whether a tile is built for the arch: sm_75 lacks shared memory or registers for the widest.
constexpr bool attention_built(const AttentionTile& t, int arch) {
  return arch >= 800 || (attention_shared_bytes(t, arch) <= 65536 && !(t.general && t.width > 128));
}

struct AttentionProblem {
  DType dtype;
  int64_t heads, group, query_length, head_dim, value_dim;
  int64_t key_begin, key_end;  // keys that some query may see
  bool general;
  bool tiled = false;  // TMA can tell where query, key and value lie; asked for where the chip has it
};

struct AttentionPlan {
  AttentionKernel kernel;
  int tile;   // index into kAttentionTiles, kAttentionSimtRows or kAttentionWgmmaTiles
  int heads;  // of an item: the rows of so many heads that share key and value stand in one tile
  int splits;
  int64_t tiles_per_split, first_tile;  // tiles along the keys
};

constexpr int attention_rows(AttentionKernel kernel, int tile) {
  return kernel == AttentionKernel::Mma     ? kAttentionTiles[tile].rows
         : kernel == AttentionKernel::Wgmma ? kAttentionWgmmaTiles[tile].rows
                                            : kAttentionSimtRows[tile];
}
constexpr int attention_keys(AttentionKernel kernel, int tile) {
  return kernel == AttentionKernel::Mma     ? kAttentionTiles[tile].keys
         : kernel == AttentionKernel::Wgmma ? kAttentionWgmmaTiles[tile].keys
                                            : kAttentionSimtKeys;
}
// Blocks before the keys are split. Without tensor cores a block has 128 columns of value (64 in double).
constexpr int64_t attention_blocks(const AttentionProblem& p, const AttentionPlan& plan) {
  const int64_t rows = attention_rows(plan.kernel, plan.tile), columns = p.dtype == DType::Float64 ? 64 : 128;
  const int64_t chunks =
      plan.kernel != AttentionKernel::Simt || p.value_dim <= columns ? 1 : (p.value_dim + columns - 1) / columns;
  return p.heads / plan.heads * ((plan.heads * p.query_length + rows - 1) / rows) * chunks;
}

// Splits of equal size, none of them empty: `wanted` or a few less.
constexpr AttentionPlan attention_split(AttentionPlan plan, const AttentionProblem& p, int64_t wanted) {
  const int64_t keys = attention_keys(plan.kernel, plan.tile);
  plan.first_tile = p.key_begin / keys;
  const int64_t tiles = p.key_end > p.key_begin ? (p.key_end + keys - 1) / keys - plan.first_tile : 0;
  plan.tiles_per_split = tiles < 1 ? 1 : (tiles + wanted - 1) / wanted;
  plan.splits = tiles < 1 ? 1 : static_cast<int>((tiles + plan.tiles_per_split - 1) / plan.tiles_per_split);
  return plan;
}

// Sums, largest scores and weighted values of every split, in the type that sums are kept in.
constexpr int64_t attention_partial_bytes(const AttentionProblem& p, int splits) {
  return splits > 1 ? splits * p.heads * p.query_length * (p.value_dim + 2) * (p.dtype == DType::Float64 ? 8 : 4) : 0;
}

// Whether the tile serves the problem at all.
constexpr bool attention_fits(const AttentionProblem& p, const AttentionTile& t, int capability, int shared_bytes) {
  const bool half = p.dtype == DType::Float16 || p.dtype == DType::BFloat16;
  return half && (capability >= 80 || p.dtype == DType::Float16) && p.head_dim <= t.width && p.value_dim <= t.width &&
         (t.general || !p.general) && attention_built(t, 10 * capability) &&
         attention_shared_bytes(t, 10 * capability) <= shared_bytes;
}

constexpr bool attention_wgmma_fits(const AttentionProblem& p, const AttentionWgmmaTile& t, int capability,
                                    int shared_bytes) {
  const bool half = p.dtype == DType::Float16 || p.dtype == DType::BFloat16;
  return half && capability == 90 && p.tiled && !p.general && p.head_dim <= t.width && p.value_dim <= t.width &&
         attention_wgmma_shared_bytes(t) <= shared_bytes;
}

inline constexpr int kFewRows = 16;
inline constexpr int kManyRows = 64;  // one group of four warps has work at least
inline constexpr int64_t kMostAttentionPartialBytes = int64_t{64} << 20;

constexpr AttentionPlan attention_plan(const AttentionProblem& p, int capability, int multiprocessors,
                                       int shared_bytes) {
  // The heads of a group share tiles where each has a few queries: key and value are read once for all.
  const int64_t group = p.group < 1 ? 1 : p.group;
  const bool packed = p.query_length <= 8 && group * p.query_length <= 1024;
  AttentionPlan plan = {AttentionKernel::Simt, 0, packed ? static_cast<int>(group) : 1, 1, 1, 0};
  const bool few = plan.heads * p.query_length <= kFewRows;
  for (int i = 0; i < kAttentionWgmmaTileCount && plan.kernel == AttentionKernel::Simt; ++i)
    if (p.query_length >= kManyRows && attention_wgmma_fits(p, kAttentionWgmmaTiles[i], capability, shared_bytes))
      plan.kernel = AttentionKernel::Wgmma, plan.tile = i;
  for (const bool want_few : {true, false}) {
    if (want_few && !few) continue;
    for (int i = 0; i < kAttentionTileCount && plan.kernel == AttentionKernel::Simt; ++i)
      if ((kAttentionTiles[i].warps_of_keys > 1) == want_few &&
          attention_fits(p, kAttentionTiles[i], capability, shared_bytes))
        plan.kernel = AttentionKernel::Mma, plan.tile = i;
  }
  if (plan.kernel == AttentionKernel::Simt) plan.tile = few ? 1 : 0;
  // Two blocks to a multiprocessor keep enough loads in flight (of wgmma's one has it all); a split has at least four
  // steps, and 256 keys.
  const bool whole = plan.kernel == AttentionKernel::Wgmma;
  const int64_t blocks = attention_blocks(p, plan), keys = p.key_end - p.key_begin;
  const int64_t least = whole && attention_keys(plan.kernel, plan.tile) > 64 ? 512 : 256;
  int64_t wanted = blocks > 0 && blocks < multiprocessors ? (whole ? 1 : 2) * multiprocessors / blocks : 1;
  if (wanted > keys / least) wanted = keys / least;
  if (wanted > 128) wanted = 128;
  while (wanted > 1 && attention_partial_bytes(p, static_cast<int>(wanted)) > kMostAttentionPartialBytes) wanted /= 2;
  return attention_split(plan, p, wanted < 1 ? 1 : wanted);
}

inline constexpr int64_t kAttentionSectionBytes = int64_t{16} << 20;  // of keys and values: a third of the L2 of sm_90
// Heads of a section: one where all rows see about as many keys, since then no order is better than rows in turn.
constexpr int64_t attention_section(int64_t heads, int64_t group, int64_t bytes_of_head, bool uneven) {
  if (!uneven) return 1;
  const int64_t fit = bytes_of_head > 0 ? kAttentionSectionBytes / bytes_of_head : heads;
  const int64_t section = (fit < 1 ? 1 : fit) * group;
  return section < heads ? section : heads;
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// A block owns `rows` keys (for dK and dV) or queries (for dQ) and walks along the other side, `walked` a step. Warps
// share the rows and, where accumulators of all columns do not fit a warp's registers, the columns. `second_slots`: of
// dO (for dQ: of values) in shared memory; with one its copy does not run a step ahead.
struct AttentionGradTile {
  int width, rows, walked, warps_of_rows, warps_of_columns, second_slots;
};
inline constexpr AttentionGradTile kAttentionGradTiles[] = {
    {64, 128, 32, 4, 1, 2},
    {128, 128, 64, 4, 2, 2},  // 32 rows a warp: a third less is read from shared memory for each product
    {128, 128, 32, 8, 1, 2},  // where a block may have 99 KiB
    {256, 32, 32, 2, 2, 1},
};
inline constexpr int kAttentionGradTileCount = 4, kNoAttentionGradTile = -1;

constexpr int attention_grad_threads(const AttentionGradTile& t) { return 32 * t.warps_of_rows * t.warps_of_columns; }
// What the block owns, the ring, P and dS where warps exchange them, lse and delta of two steps.
constexpr int attention_grad_shared_bytes(const AttentionGradTile& t) {
  const int own = 2 * t.rows * t.width * 2, ring = (2 + t.second_slots) * t.walked * t.width * 2;
  return own + ring + (t.warps_of_columns > 1 ? 2 * t.rows * t.walked * 2 : 0) + 2 * 2 * t.walked * 4;
}

// Whether a tile is built for the arch: sm_75 has too few registers. The tile of 161 KiB is for the chips of 163 KiB and more, each by its number:
// another chip runs the code of one that it resembles.
constexpr bool attention_grad_built(const AttentionGradTile& t, int arch) {
  const int bytes = attention_grad_shared_bytes(t);
  if (bytes > 101376) return arch == 800 || arch == 900 || arch == 1000 || arch == 1030;
  return arch >= 800;
}
constexpr bool attention_grad_fits(DType dtype, int64_t head_dim, int64_t value_dim, const AttentionGradTile& t,
                                   int capability, int shared_bytes) {
  const bool half = dtype == DType::Float16 || dtype == DType::BFloat16;
  return half && head_dim <= t.width && value_dim <= t.width && attention_grad_built(t, 10 * capability) &&
         attention_grad_shared_bytes(t) <= shared_bytes;
}
// The tile for dQ, dK and dV, or none: then the kernels without tensor cores serve.
constexpr int attention_grad_tile(DType dtype, int64_t head_dim, int64_t value_dim, int capability, int shared_bytes) {
  for (int i = 0; i < kAttentionGradTileCount; ++i)
    if (attention_grad_fits(dtype, head_dim, value_dim, kAttentionGradTiles[i], capability, shared_bytes)) return i;
  return kNoAttentionGradTile;
}

}  // namespace fastnn::cuda

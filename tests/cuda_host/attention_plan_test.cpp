// attention's index maths and plans, exhaustively: where chunks of tiles lie, the ring's size, which kernel and how
// many splits.
#include <algorithm>
#include <cstdio>
#include <set>

#include "cuda/attention_backward_sm80.cuh"
#include "cuda/attention_simt.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/attention_sm90.cuh"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition && ++failures <= 20) std::printf("FAILED attention plan: %s\n", what);
}

// Chunks of a tile of keys lie in distinct places, and the chunks of eight rows that ldmatrix reads differ modulo 8.
template <int TILE>
void check_places() {
  using Kernel = AttentionMmaKernel<Float16, TILE>;
  constexpr AttentionTile t = kAttentionTiles[TILE];
  std::set<int> places;
  for (int r = 0; r < t.keys; ++r)
    for (int c = 0; c < Kernel::kChunks; ++c) {
      const int place = Kernel::template place<t.keys>(r, c);
      expect(place == Kernel::template place<t.keys>(r, c & ~1, c & 1), "a chunk has one place");
      expect(place >= 0 && place + 16 <= Kernel::kSlotBytes && place % 16 == 0, "chunks are inside of the slot");
      expect(places.insert(place).second, "each chunk has its own place");
    }
  for (int r = 0; r < t.keys; r += 8)
    for (int c = 0; c < Kernel::kChunks; ++c) {
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(Kernel::template place<t.keys>(r + i, c) / 16 % 8);
      expect(banks.size() == 8, "ldmatrix without bank conflicts");
    }
  for (const int arch : {750, 800, 860, 890, 900, 1000, 1200}) {
    const int slots = attention_slots(t, arch), bytes = attention_shared_bytes(t, arch);
    expect(slots >= 2 && slots <= 4, "the ring has two to four slots");
    expect(!attention_built(t, arch) || bytes <= (arch == 750 ? 65536 : 101376),
           "a block fits the smallest of its kind");
    expect(attention_built(t, arch) || (arch == 750 && t.width == 256),
           "only the widest tiles are not built for sm_75");
    expect(arch == 750 || 2 * (bytes + 1024) <= 167936, "two blocks share a multiprocessor of sm_80");
  }
  if constexpr (TILE + 1 < kAttentionTileCount) check_places<TILE + 1>();
}

template <class T>
void check_simt_keys() {
  using Kernel = AttentionSimtKernel<T, 0>;
  std::set<int> keys;
  for (int tx = 0; tx < 16; ++tx)
    for (int j = 0; j < 4; ++j) {
      const int key = Kernel::key_of(tx, j);
      expect(Kernel::place_of_key(key) == 4 * tx + j, "a thread's keys follow each other");
      expect(keys.insert(key).second && key < 64, "every key has one thread");
      expect(key / 32 == Kernel::key_of(tx, 0) / 32 && key % 32 / 8 == j, "one Philox serves a thread's keys");
    }
  expect(Kernel::kSharedBytes <= 65536, "a block fits sm_75");
}

// Every tile of wgmma's is taken by one block at one turn; heads come in sections, in each the later rows first.
void check_order() {
  for (uint32_t heads : {1, 2, 7, 24})
    for (uint32_t row_tiles : {1, 2, 5, 16})
      for (uint32_t section = 1; section <= heads; section += 1 + section / 3) {
        const uint32_t tiles = heads * row_tiles;
        std::set<uint32_t> places;
        AttentionWork last = {};
        for (uint32_t i = 0; i < tiles; ++i) {
          const AttentionWork work = attention_work(i, heads, row_tiles, section);
          expect(work.head < heads && work.row_tile < row_tiles, "a tile of a head");
          expect(places.insert(work.head * row_tiles + work.row_tile).second, "each tile comes once");
          if (i > 0)
            expect(work.head / section > last.head / section ||
                       (work.head / section == last.head / section && work.row_tile <= last.row_tile),
                   "sections in turn, later rows first");
          last = work;
        }
        expect(places.size() == tiles, "every tile comes");
        for (uint32_t blocks = 1; blocks <= tiles; blocks += 1 + blocks / 2) {
          std::set<uint32_t> indices;
          for (uint32_t block = 0; block < blocks; ++block)
            for (uint32_t turn = 0; attention_turn(turn, block, blocks) < tiles; ++turn)
              expect(indices.insert(attention_turn(turn, block, blocks)).second, "each tile has one block");
          expect(indices.size() == tiles, "every tile has a block");
        }
      }
  // With a causal limit a tile takes as long as its rows are late: the longest block hardly longer than the mean.
  const uint32_t heads = 32, row_tiles = 32, blocks = 132;
  uint64_t longest = 0, all = 0;
  for (uint32_t block = 0; block < blocks; ++block) {
    uint64_t own = 0;
    for (uint32_t turn = 0, at; (at = attention_turn(turn, block, blocks)) < heads * row_tiles; ++turn)
      own += attention_work(at, heads, row_tiles, heads).row_tile + 1;
    all += own, longest = own > longest ? own : longest;
  }
  expect(longest * blocks * 100 <= all * 106, "causal tiles are shared out evenly");
  static_assert(attention_section(32, 4, int64_t{4} << 20, true) == 16, "four keys and values of 4 MiB");
  static_assert(attention_section(32, 4, int64_t{1} << 30, true) == 4, "one, if more do not fit");
  static_assert(attention_section(6, 2, 0, true) == 6 && attention_section(6, 2, 1024, true) == 6);
  static_assert(attention_section(6, 2, 1024, false) == 1);
  for (const AttentionWgmmaTile& t : kAttentionWgmmaTiles) {
    expect(attention_wgmma_shared_bytes(t) <= 232448, "a block fits a multiprocessor of sm_90");
    expect(t.slots >= 4, "two steps of keys and values in the ring");
    expect(t.keys * t.width * 2 % 1024 == 0 && t.rows * t.width * 2 % 1024 == 0, "swizzled tiles start on 1024 bytes");
  }
}

void check_plans() {
  for (const DType dtype : {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16})
    for (const int capability : {75, 80, 86, 90})
      for (const int multiprocessors : {1, 20, 132})
        for (int64_t L = 1; L < 20000; L += 1 + L / 2)
          for (int64_t S = 0; S < 100000; S += 1 + S)
            for (const int64_t group : {1, 3, 8, 71})
              for (const int64_t D : {0, 1, 33, 64, 80, 128, 160, 256, 257})
                for (const int kind : {0, 1, 2}) {
                  const bool general = kind == 1, tiled = kind == 2;
                  const int64_t begin = S / 3 * (L % 2), V = D == 80 ? 300 : D;
                  const AttentionProblem p = {dtype, 2 * group, group, L, D, V, begin, S, general, tiled};
                  const int shared = capability == 75   ? 65536
                                     : capability == 80 ? 166912
                                     : capability == 90 ? 232448
                                                        : 101376;
                  const AttentionPlan plan = attention_plan(p, capability, multiprocessors, shared);
                  const bool half = dtype == DType::Float16 || dtype == DType::BFloat16;
                  const bool mma = plan.kernel == AttentionKernel::Mma;
                  const bool wgmma = plan.kernel == AttentionKernel::Wgmma;
                  expect(wgmma == (half && capability == 90 && tiled && L >= kManyRows && D <= 256 && V <= 256),
                         "many rows that TMA can describe go to wgmma, and no others");
                  expect(!wgmma || (plan.heads == 1 &&
                                    (plan.tile == 0 || kAttentionWgmmaTiles[plan.tile - 1].width < std::max(D, V))),
                         "the narrowest tile of wgmma");
                  expect(!wgmma || plan.splits == 1 || plan.splits * attention_blocks(p, plan) <= multiprocessors,
                         "one block to a multiprocessor where wgmma's keys are split");
                  expect(!mma || attention_fits(p, kAttentionTiles[plan.tile], capability, shared), "a tile that fits");
                  expect(mma || wgmma || !half || D > 256 || V > 256 || (capability < 80 && dtype == DType::BFloat16) ||
                             capability == 75,
                         "16 bits go to tensor cores where they can");
                  expect(!mma || !kAttentionTiles[plan.tile].general || general || plan.heads * L <= kFewRows,
                         "scores that need no more than a factor go to the plain kind");
                  expect(plan.heads == 1 || plan.heads == group, "heads stand in a tile all or alone");
                  const int64_t keys = attention_keys(plan.kernel, plan.tile), first = plan.first_tile * keys;
                  expect(first <= begin && begin < first + keys, "splits begin with the first key that is seen");
                  expect(first + plan.splits * plan.tiles_per_split * keys >= S, "splits cover the keys");
                  expect(plan.splits == 1 || first + (plan.splits - 1) * plan.tiles_per_split * keys < S,
                         "no split is empty");
                  expect(plan.splits >= 1 && plan.splits <= 128, "splits are a grid");
                  expect(attention_partial_bytes(p, plan.splits) <= kMostAttentionPartialBytes,
                         "the workspace is bounded");
                }
  // Whole waves are not split; one query against many keys is, and its heads share a tile.
  constexpr AttentionProblem large = {DType::BFloat16, 64, 8, 4096, 128, 128, 0, 4096, false};
  constexpr AttentionProblem tiled = {DType::BFloat16, 64, 8, 4096, 128, 128, 0, 4096, false, true};
  static_assert(attention_plan(tiled, 90, 132, 232448).kernel == AttentionKernel::Wgmma &&
                attention_plan(tiled, 90, 132, 232448).tile == 1);
  static_assert(attention_plan(large, 90, 132, 232448).splits == 1 && attention_plan(large, 90, 132, 232448).tile == 3);
  constexpr AttentionProblem decode = {DType::BFloat16, 32, 8, 1, 128, 128, 0, 8192, false};
  static_assert(attention_plan(decode, 90, 132, 232448).splits > 16 &&
                attention_plan(decode, 90, 132, 232448).heads == 8);
  static_assert(kAttentionTiles[attention_plan(decode, 90, 132, 232448).tile].rows == 16);
}

// Gradients: every problem that a built tile holds goes to tensor cores, to the narrowest and largest that fits, and
// chips are never given what their code lacks.
template <int TILE>
void check_grad_tiles() {
  constexpr AttentionGradTile t = kAttentionGradTiles[TILE];
  using Keys = AttentionGradMmaKernel<Float16, TILE, true>;
  const int bytes = attention_grad_shared_bytes(t);
  expect(
      bytes == 2 * Keys::kOwnBytes + (2 + t.second_slots) * Keys::kSlotBytes + 2 * Keys::kWeightBytes + 16 * t.walked,
      "the plan's shared memory is what the kernel lays out");
  expect(t.rows % (16 * t.warps_of_rows) == 0 && t.walked % (16 * t.warps_of_columns) == 0, "warps share a tile");
  for (const int arch : {750, 800, 860, 870, 890, 900, 1000, 1030, 1100, 1200, 1210})
    if (attention_grad_built(t, arch))
      expect(arch >= 800 && bytes <= (arch == 800 || arch == 900 || arch == 1000 || arch == 1030 ? 166912 : 101376),
             "a tile is built where a block has the memory");
  // What P and dS go through: ldmatrix reads eight rows of a chunk without bank conflicts.
  for (int r = 0; r < t.rows; r += 8)
    for (int c = 0; c < t.walked / 8; ++c) {
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(panel_place<t.walked, t.rows>(r + i, c) / 16 % 8);
      expect(banks.size() == 8, "weights are read without bank conflicts");
    }
  if constexpr (TILE + 1 < kAttentionGradTileCount) check_grad_tiles<TILE + 1>();
}

void check_grad_plans() {
  for (const DType dtype : {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16})
    for (const int capability : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121})
      for (int64_t D = 0; D <= 300; ++D)
        for (const int64_t V : {int64_t{0}, D, 300 - D}) {
          const bool large = capability == 80 || capability == 90 || capability == 100 || capability == 103;
          const int shared = capability == 75 ? 65536 : large ? 166912 : 101376;
          const int tile = attention_grad_tile(dtype, D, V, capability, shared);
          const bool half = dtype == DType::Float16 || dtype == DType::BFloat16;
          const int64_t width = D > V ? D : V;
          if (!half || capability < 80 || width > 256) {
            expect(tile == kNoAttentionGradTile, "no tensor cores where there are none for it");
            continue;
          }
          expect(tile == (width <= 64 ? 0 : width > 128 ? 3 : large ? 1 : 2), "the narrowest tile, the largest");
          expect(attention_grad_fits(dtype, D, V, kAttentionGradTiles[tile], capability, shared), "a tile that fits");
        }
  static_assert(attention_grad_tile(DType::BFloat16, 128, 128, 90, 49152) == kNoAttentionGradTile);
}

}  // namespace

int main() {
  check_places<0>();
  check_simt_keys<float>(), check_simt_keys<double>();
  check_order();
  check_plans();
  check_grad_tiles<0>();
  check_grad_plans();
  std::printf("attention plan: %d failed\n", failures);
  return failures != 0;
}

// Index maths and heuristics, exhaustively: swizzles, the order of tiles, copy widths, splits and plans.
#include <cstdio>
#include <set>
#include <utility>

#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/tile.cuh"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition && ++failures <= 20) std::printf("FAILED plan: %s\n", what);
}

// A tile's chunks lie in distinct places, and neither ldmatrix (one chunk of eight rows) nor a copy of eight chunks
// that follow each other meets in a bank: their places differ modulo 8.
template <int CHUNKS>
void check_swizzle() {
  std::set<int> places;
  for (int row = 0; row < 128; ++row)
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int place = swizzled<CHUNKS>(row, chunk);
      expect(place / CHUNKS == row && places.insert(place).second, "a swizzle keeps rows and is one to one");
    }
  for (int row = 0; row < 128; row += 8)
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      std::set<int> banks;
      for (int r = 0; r < 8; ++r) banks.insert(swizzled<CHUNKS>(row + r, chunk) % 8);
      expect(banks.size() == 8, "ldmatrix without bank conflicts");
    }
  for (int first = 0; first < 128 * CHUNKS; first += 8) {
    std::set<int> banks;
    for (int i = first; i < first + 8; ++i) banks.insert(swizzled<CHUNKS>(i / CHUNKS, i % CHUNKS) % 8);
    expect(banks.size() == 8, "copies without bank conflicts");
  }
}

// Tiles of floats with K slow: lane (g, t) of a fragment reads element side + g of row k + t, a bank each.
template <int CHUNKS>
void check_words() {
  std::set<int> places;
  for (int row = 0; row < 32; ++row)
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int place = swizzled_words<CHUNKS>(row, chunk);
      expect(place / CHUNKS == row && places.insert(place).second, "a swizzle of words keeps rows and is one to one");
    }
  for (int k = 0; k < 32; k += 4)
    for (int side = 0; side < 4 * CHUNKS; side += 8) {
      std::set<int> banks;
      for (int lane = 0; lane < 32; ++lane) {
        const int s = side + lane / 4;
        banks.insert((4 * swizzled_words<CHUNKS>(k + lane % 4, s / 4) + s % 4) % 32);
      }
      expect(banks.size() == 32, "fragments of words without bank conflicts");
    }
}

template <int COLS>
void check_staged() {
  std::set<int> places;
  for (int row = 0; row < 64; ++row)
    for (int col = 0; col < COLS; ++col) expect(places.insert(staged<COLS>(row, col)).second, "staging is one to one");
  for (int row = 0; row < 64; row += 4)  // half a warp stores two columns of four rows
    for (int col = 0; col < COLS; col += 8) {
      std::set<int> banks;
      for (int lane = 0; lane < 16; ++lane) banks.insert(staged<COLS>(row + lane / 4, col + lane % 4 * 2) % 32);
      expect(banks.size() == 16, "fragments are staged without bank conflicts");
    }
}

void check_places() {
  for (int64_t rows = 1; rows <= 20; ++rows)
    for (int64_t cols = 1; cols <= 20; ++cols) {
      std::set<std::pair<int64_t, int64_t>> seen, grouped;
      for (int64_t i = 0; i < rows * cols; ++i) {
        const TilePlace place = tile_place(i, rows, cols);
        expect(place.m >= 0 && place.m < rows && place.n >= 0 && place.n < cols, "tiles are inside");
        expect(seen.insert({place.m, place.n}).second, "every tile once");
        const TilePlace wide = tile_place(i, rows, cols, 16);
        expect(wide.m >= 0 && wide.m < rows && wide.n >= 0 && wide.n < cols, "tiles are inside");
        expect(grouped.insert({wide.m, wide.n}).second, "every tile once");
      }
    }
}

void check_widths() {
  for (uint64_t address = 0; address < 64; address += 2)
    for (int64_t ld = 0; ld < 32; ++ld) {
      const int width = copy_width(address, ld);
      expect(width == 2 || width == 4 || width == 8 || width == 16, "a width of cp.async, or elements");
      for (uint64_t row = 0; row < 9; ++row) expect((address + 2 * row * ld) % width == 0, "every row is aligned");
    }
}

void check_plans() {
  for (const LinearKernel kernel : {LinearKernel::Gemv, LinearKernel::Mma, LinearKernel::Simt, LinearKernel::Tf32,
                                    LinearKernel::Thin, LinearKernel::Wgmma})
    for (int tile = 0; tile < (kernel == LinearKernel::Thin ? 3 : 2); ++tile)
      for (int64_t K = 0; K < 1500; ++K)
        for (int wanted = 1; wanted < 9; ++wanted) {
          const LinearPlan plan = linear_split(kernel, tile, K, wanted);
          expect(plan.splits >= 1 && plan.splits <= wanted && plan.k_per_split % linear_tile(kernel, tile).k == 0,
                 "splits are whole tiles");
          expect(plan.splits * plan.k_per_split >= K, "splits cover K");
          expect(K == 0 || (plan.splits - 1) * plan.k_per_split < K, "no split is empty");
        }
  for (const DType dtype : {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16})
    for (const int capability : {75, 80, 86, 90, 103, 120})
      for (const int multiprocessors : {1, 20, 132})
        for (int64_t M = 1; M < 20000; M += 1 + M / 3)
          for (int64_t N = 1; N < 20000; N += 1 + N / 2)
            for (int64_t K = 1; K < 40000; K += 1 + K)
              for (int layout = 0; layout < 8; ++layout) {  // 6 and 7: TMA can describe the operands
                const bool tma = layout > 5, dense = layout / 2 != 2, along_k = layout / 2 % 3 == 0, tf32 = layout % 2;
                const LinearPlan plan = linear_plan({dtype, M, N, K, dense, dense, along_k, tf32, along_k || tf32, tma},
                                                    capability, multiprocessors);
                const bool one = plan.kernel == LinearKernel::Tf32, three = plan.kernel == LinearKernel::Tf32x3;
                const bool half = dtype == DType::Float16 || dtype == DType::BFloat16;
                expect(plan.kernel != LinearKernel::Gemv || (M <= kGemvTile.m && along_k), "gemv: a few rows along K");
                expect(plan.kernel != LinearKernel::Mma || (half && dense), "tensor cores: 16 bits, dense");
                expect(plan.kernel != LinearKernel::Wgmma || (half && tma && capability == 90),
                       "wgmma: 16 bits, by TMA, sm_90 and nothing after it");
                expect(plan.kernel != LinearKernel::Thin || (half && dense && (along_k || tf32) && capability >= 80 &&
                                                             M <= linear_tile(plan.kernel, plan.tile).m),
                       "thin: up to 64 rows of 16 bits along K");
                expect(!(one || three) || (dtype == DType::Float32 && dense && capability >= 80 && one == tf32),
                       "TF32 in one product where it is allowed alone");
                expect(!three || (K >= 32 && (capability == 80 || capability == 90 || capability == 103)),
                       "three where that pays");
                expect(plan.kernel == LinearKernel::Simt || capability >= 80 || dtype != DType::BFloat16,
                       "no bfloat16 on tensor cores before sm_80");
                expect(plan.kernel != LinearKernel::Simt || plan.tile == 1 || dtype == DType::Float32,
                       "the large tile without tensor cores is built for float32 only");
                expect(linear_partial_bytes(dtype, M, N, plan.splits) <= kMostPartialBytes, "the workspace is bounded");
                expect(plan.splits <= 2 * 132 + 32, "splits are a grid");
              }
  // Whole waves of large tiles are not split; a narrow problem with much K is.
  constexpr LinearProblem large = {DType::BFloat16, 8192, 8192, 8192, true, true, true};
  static_assert(linear_plan(large, 80, 108).tile == 0 && linear_plan(large, 80, 108).splits == 1);
  constexpr LinearProblem narrow = {DType::BFloat16, 64, 256, 65536, true, true, true};
  static_assert(linear_plan(narrow, 80, 108).splits > 4);
  // wgmma where TMA can have the operands: the large tile for large problems, the small one where it fills the chip.
  constexpr LinearProblem by_tma = {DType::BFloat16, 8192, 8192, 8192, true, true, true, false, true, true};
  static_assert(linear_plan(by_tma, 90, 132).kernel == LinearKernel::Wgmma && linear_plan(by_tma, 90, 132).tile == 0);
  static_assert(linear_plan(by_tma, 120, 132).kernel == LinearKernel::Mma);
  static_assert(linear_plan(large, 90, 132).kernel == LinearKernel::Mma);
  constexpr LinearProblem middle = {DType::BFloat16, 1024, 2048, 4096, true, true, true, false, true, true};
  static_assert(linear_plan(middle, 90, 132).kernel == LinearKernel::Wgmma && linear_plan(middle, 90, 132).tile == 1);
  constexpr LinearProblem few = {DType::BFloat16, 4, 4096, 4096, true, true, true};
  static_assert(linear_plan(few, 80, 108).kernel == LinearKernel::Gemv);
  // A few rows: a block for each multiprocessor with no splits where there are features enough.
  for (const int64_t M : {9, 16, 24, 32, 64}) {
    const LinearPlan plan = linear_plan({DType::BFloat16, M, 4096, 4096, true, true, true, false, true}, 90, 132);
    expect(plan.kernel == LinearKernel::Thin && (M > 32 || plan.splits == 1), "a few rows are thin");
  }
  // float32: FMAs, three products where TF32 is fast, one where it is allowed.
  LinearProblem floats = {DType::Float32, 512, 512, 512, true, true, true};
  expect(linear_plan(floats, 86, 84).kernel == LinearKernel::Simt, "FMAs where TF32 is no faster");
  expect(linear_plan(floats, 90, 132).kernel == LinearKernel::Tf32x3, "three products on 9.0");
  floats.allow_tf32 = true;
  expect(linear_plan(floats, 86, 84).kernel == LinearKernel::Tf32, "one product where it is allowed");
  expect(linear_plan(floats, 75, 40).kernel == LinearKernel::Simt, "no TF32 before 8.0");
}

}  // namespace

int main() {
  check_swizzle<2>(), check_swizzle<4>(), check_swizzle<8>(), check_swizzle<16>();
  check_staged<32>(), check_staged<64>(), check_staged<128>();
  check_words<16>(), check_words<32>();
  check_places();
  check_widths();
  check_plans();
  std::printf("plan: %d failed\n", failures);
  return failures != 0;
}

// The shim's mbarriers, TMA, wgmma and named barriers: right values from right use, and each mistake ends the program.
#include <cmath>
#include <cstdio>
#include <set>
#include <vector>

#include "cuda/ptx_sm90.cuh"
#include "problem.h"
#include "shim_case.h"

using namespace fastnn;
using namespace fastnn::cuda;
using namespace fastnn::cuda::shim;

namespace {

unsigned char* memory() { return ptx::dynamic_shared(); }
uint64_t* bar(int index = 0) { return reinterpret_cast<uint64_t*>(memory() + 40960) + index; }
constexpr int kBytes = 49152;

// Where byte `byte` of row `row` of a swizzled tile lies.
int place(int row, int byte) { return row * 128 + ((byte / 16 ^ row % 8) * 16 | byte % 16); }

void make_bars(int count, int arrivals) {
  if (thread() == 0) {
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(bar(i), arrivals);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
}

alignas(128) uint16_t global[8192];
TensorMap matrix_map(int rows, int cols, int box_rows = 8, const uint16_t* data = global, int ld = 64) {
  TensorMap map;
  const int64_t sizes[2] = {cols, rows}, strides[2] = {2, 2 * ld};
  const int box[2] = {64, box_rows};
  if (!encode_tensor_map(map, DType::Float16, data, 2, sizes, strides, box)) std::abort();
  return map;
}

void load(const TensorMap& map, int rows, int stage = 0, int at = 0) {
  ptx::mbarrier_arrive_expect(bar(stage), rows * 128);
  ptx::tma_load(memory() + stage * 1024, &map, bar(stage), {0, at});
}

// ---- right use ------------------------------------------------------------------------------------------------------

void loads() {
  for (int i = 0; i < 8192; ++i) global[i] = static_cast<uint16_t>(i + 1);
  static bool right;
  right = true;
  const TensorMap map = matrix_map(11, 50, 8, global + 64);
  run(
      [&] {  // 8 rows, of which 5 and 50 columns are inside; 3 columns and 2 rows before the first
        make_bars(2, 1);
        if (thread() == 0) {
          load(map, 8, 0, 6);
          ptx::mbarrier_arrive_expect(bar(1), 1024);
          ptx::tma_load(memory() + 1024, &map, bar(1), {-3, -2});
        }
        ptx::mbarrier_wait(bar(0), 0), ptx::mbarrier_wait(bar(1), 0);
        for (int row = 0; row < 8; ++row) {
          const int col = thread();
          const auto got = ptx::shared_load<uint16_t>(memory() + place(row, 2 * col));
          right &= got == (row < 5 && col < 50 ? 64 * (row + 7) + col + 1 : 0);
          const auto before = ptx::shared_load<uint16_t>(memory() + 1024 + place(row, 2 * col));
          right &= before == (row >= 2 && col >= 3 && col < 53 ? 64 * (row - 1) + col - 2 : 0);
        }
      },
      64, kBytes);
  expect(right, "TMA loads swizzled rows and zeros outside");
}

// Ranks 3 to 5 there and back: the part of the box that is inside comes home, all else stays.
template <int RANK>
void round_trip() {
  const int64_t all[5] = {64, 3, 3, 2, 2}, inside[5] = {64, 2, 3, 2, 2};
  int64_t strides[5] = {2}, sizes[5];
  for (int i = 0; i < 5; ++i) sizes[i] = inside[i];
  for (int i = 1; i < 5; ++i) strides[i] = strides[i - 1] * all[i - 1];
  const int box[5] = {64, 2, 2, 2, 1};
  int64_t total = 1, bytes = 2;
  for (int i = 0; i < RANK; ++i) total *= all[i], bytes *= box[i];
  Buffer<uint16_t> from(total + 8), to(total + 8);
  uint16_t* const source = from.data.get() + (16 - reinterpret_cast<uintptr_t>(from.data.get()) % 16) / 2 % 8;
  uint16_t* const target = to.data.get() + (16 - reinterpret_cast<uintptr_t>(to.data.get()) % 16) / 2 % 8;
  for (int64_t i = 0; i < total; ++i) source[i] = static_cast<uint16_t>(i + 1), target[i] = 0;
  TensorMap in, out;
  expect(encode_tensor_map(in, DType::BFloat16, source, RANK, sizes, strides, box) &&
             encode_tensor_map(out, DType::BFloat16, target, RANK, sizes, strides, box),
         "a map of 3 to 5 dimensions");
  run(
      [&] {
        make_bars(1, 1);
        if (thread() == 0) {
          int at[RANK] = {0, 1, 1};  // one row of dimension 1 inside, two of dimension 2
          if constexpr (RANK == 5) at[4] = 1;
          ptx::mbarrier_arrive_expect(bar(), static_cast<int>(bytes));
          ptx::tma_load(memory(), &in, bar(), at);
          ptx::mbarrier_wait(bar(), 0);
          ptx::tma_store(&out, memory(), at);
          ptx::tma_store_commit();
          ptx::tma_store_wait<0>();
        }
      },
      32, kBytes);
  bool right = true;
  for (int64_t i = 0; i < total; ++i) {
    int64_t index[5] = {}, rest = i;
    for (int j = 0; j < RANK; ++j) index[j] = rest % all[j], rest /= all[j];
    const bool moved = index[1] == 1 && index[2] >= 1 && (RANK < 5 || index[4] == 1);
    right &= target[i] == (moved ? source[i] : 0);
  }
  expect(right, "TMA loads and stores of 3 to 5 dimensions");
}

// A ring of two stages, one producer and two consuming warps, more rounds than stages; the phases keep it in step.
void ring() {
  static int sums[64];
  for (int i = 0; i < 64; ++i) sums[i] = 0;
  for (int i = 0; i < 8192; ++i) global[i] = static_cast<uint16_t>(i / 512);
  const TensorMap map = matrix_map(128, 64);
  run(
      [&] {
        if (thread() == 0) {
          for (int i = 0; i < 2; ++i) ptx::mbarrier_init(bar(i), 1), ptx::mbarrier_init(bar(2 + i), 2);
          ptx::mbarrier_init_fence();
        }
        __syncthreads();
        if (thread() >= 64) {
          if (thread() == 64)
            for (int round = 0; round < 16; ++round) {
              ptx::mbarrier_wait(bar(2 + round % 2), 1 - round / 2 % 2);
              load(map, 8, round % 2, round * 8);
            }
          return;
        }
        for (int round = 0; round < 16; ++round) {
          ptx::mbarrier_wait(bar(round % 2), round / 2 % 2);
          sums[thread()] += ptx::shared_load<uint16_t>(memory() + round % 2 * 1024 + 16 * thread()) == round;
          __syncwarp();
          if (thread() % 32 == 0) ptx::mbarrier_arrive(bar(2 + round % 2));
        }
      },
      96, kBytes);
  bool right = true;
  for (const int sum : sums) right &= sum == 16;
  expect(right, "a ring of mbarriers");
}

void barriers() {
  static int sum;
  sum = 0;
  run(
      [] {  // warp 1 writes, warp 0 reads; warp 2 has nothing to do with it
        auto* const values = reinterpret_cast<float*>(memory());
        if (thread() < 32) {
          ptx::named_barrier(3, 64);
          sum += static_cast<int>(ptx::shared_load<float>(values + (thread() + 5) % 32));
          ptx::named_barrier_arrive(4, 64);
        } else if (thread() < 64) {
          ptx::shared_store(values + thread() - 32, 2.0f);
          ptx::named_barrier_arrive(3, 64);
          ptx::named_barrier(4, 64);
          ptx::shared_store(values + thread() - 32, 3.0f);
        }
      },
      96);
  expect(sum == 64, "named barriers");
  run(
      [] {
        if (thread() < 128)
          ptx::registers_drop<40>();
        else
          ptx::registers_add<232>();
      },
      384);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// A matrix [lines of 64 elements] in shared memory by ordinary stores: element (mn, k) of [rows, 64] at a tile along K,
// or along M and N in groups of 64 with 64 rows each.
int place_of(bool along_k, int mn, int k) {
  return along_k ? place(mn, 2 * k) : mn / 64 * 8192 + place(k, 2 * (mn % 64));
}

template <class T, int N, bool A, bool B>
void products(bool registers) {
  constexpr int kB = 8192;  // where b lies
  std::vector<T> a(64 * 64), b(N * 64);
  for (T& x : a) x = from_double<T>(small_integer());
  for (T& x : b) x = from_double<T>(small_integer());
  std::vector<float> got(64 * N);
  run(
      [&] {
        for (int i = thread(); i < 64 * 64; i += 128)
          ptx::shared_store(memory() + place_of(A, i / 64, i % 64), a[i].bits);
        for (int i = thread(); i < N * 64; i += 128)
          ptx::shared_store(memory() + kB + place_of(B, i / 64, i % 64), b[i].bits);
        ptx::fence_async();
        __syncthreads();
        const int g = thread() % 32 / 4, t = thread() % 4, row = thread() / 32 * 16 + g;
        float d[N / 2];
        for (float& x : d) x = 7;
        uint32_t fragments[4][4];
        for (int step = 0; step < 4; ++step)
          for (int i = 0; i < 4; ++i) {
            const T* const pair = &a[(row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + 2 * t];
            fragments[step][i] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
          }
        ptx::wgmma_fence(d);
        for (int step = 0; step < 4; ++step) {
          const uint64_t left = ptx::wgmma_descriptor(memory() + step * (A ? 32 : 2048), 8192, 1024);
          const uint64_t right = ptx::wgmma_descriptor(memory() + kB + step * (B ? 32 : 2048), 8192, 1024);
          if (registers)
            ptx::wgmma<N, B>(d, fragments[step], right, T{}, step > 0);
          else
            ptx::wgmma<N, A, B>(d, left, right, T{}, step > 0);
          if (step == 1) ptx::wgmma_commit(), ptx::wgmma_wait<1>(), ptx::wgmma_fence();
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(d);
        for (int j = 0; j < N / 2; ++j) got[(row + j / 2 % 2 * 8) * N + j / 4 * 8 + 2 * t + j % 2] = d[j];
      },
      128, 8192 + N * 128 <= kBytes ? kBytes : 8192 + N * 128);
  bool right = true;
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < N; ++j) {
      double sum = 0;
      for (int k = 0; k < 64; ++k) sum += to_double(a[i * 64 + k]) * to_double(b[j * 64 + k]);
      right &= got[i * N + j] == sum;
    }
  expect(right, "wgmma");
}

template <int N>
void products_of() {
  for (const bool registers : {false, true}) {
    products<Float16, N, true, true>(registers), products<BFloat16, N, true, true>(registers);
    if constexpr (N % 64 == 0) products<BFloat16, N, true, false>(registers);
  }
  products<Float16, N, false, true>(false);
  if constexpr (N % 64 == 0) products<Float16, N, false, false>(false);
}

// ---- mistakes -------------------------------------------------------------------------------------------------------

void dies90(const char* words, const std::function<void()>& kernel, int threads = 128) {
  dies(words, kernel, threads, kBytes);
}

void mistakes_of_barriers() {
  const TensorMap map = matrix_map(64, 64);
  dies90("an mbarrier that was not initialised", [] { ptx::mbarrier_arrive(bar()); });
  dies90("with no barrier after its initialisation", [] {
    if (thread() == 0) ptx::mbarrier_init(bar(), 128);
    ptx::mbarrier_arrive(bar());
  });
  dies90("without mbarrier_init_fence", [&] {
    if (thread() == 0) ptx::mbarrier_init(bar(), 1);
    __syncthreads();
    if (thread() == 0) load(map, 8);
  });
  dies90("written as data", [] {
    make_bars(1, 1);
    ptx::shared_store(bar(), 0.0f);
  });
  dies90("read as data", [] {
    make_bars(1, 1);
    ptx::shared_load<float>(bar());
  });
  dies90("more arrivals at an mbarrier", [] {
    make_bars(1, 1);
    if (thread() == 0) ptx::mbarrier_arrive_expect(bar(), 1024), ptx::mbarrier_arrive(bar());
  });
  dies90("two phases ahead", [] {
    make_bars(1, 1);
    if (thread() < 32) ptx::mbarrier_wait(bar(), 0);
    __syncwarp();
    if (thread() == 32) ptx::mbarrier_arrive(bar()), ptx::mbarrier_arrive(bar());
  });
  dies90("a deadlock", [] {
    make_bars(1, 2);
    if (thread() == 0) ptx::mbarrier_arrive(bar());
    ptx::mbarrier_wait(bar(), 0);
  });
  dies90("threads 32 to 127: waits for parity 0 of the mbarrier at byte 40968 of shared memory, in its phase 0; 1 of 1",
         [] {
           make_bars(2, 1);
           thread() < 32 ? ptx::named_barrier(2, 64) : ptx::mbarrier_wait(bar(1), 0);
         });
  dies90("a deadlock", [&] {  // fewer bytes than expected
    make_bars(1, 1);
    if (thread() == 0) ptx::mbarrier_arrive_expect(bar(), 2048), ptx::tma_load(memory(), &map, bar(), {0, 0});
    ptx::mbarrier_wait(bar(), 0);
  });
  dies90("waits at named barrier 1, where 32 of 64 threads are", [] {
    if (thread() < 32) ptx::named_barrier(1, 64);
  });
  dies90("different numbers of threads", [] { ptx::named_barrier(1, thread() < 32 ? 64 : 96); });
  dies90("not one of 1 to 15", [] { ptx::named_barrier(0, 128); });
  dies90("a named barrier that not all lanes of a warp reach", [] {
    if (thread() < 16 || (thread() >= 32 && thread() < 48)) ptx::named_barrier(1, 32);
  });
  dies90("more registers", [] { ptx::registers_add<256>(); }, 384);
  dies90("an instruction of a warp that not all its lanes reach", [] {
    if (thread() < 64) ptx::registers_add<64>();
  });
}

void mistakes_of_copies() {
  const TensorMap map = matrix_map(64, 64);
  dies90("before the copy that fills it was waited for", [&] {
    make_bars(1, 1);
    if (thread() == 0) load(map, 8), ptx::shared_load<float>(memory());
  });
  dies90("before the copy that fills it was waited for", [&] {  // the phase ends by the arrival alone: nothing expected
    make_bars(1, 1);
    if (thread() == 0) ptx::mbarrier_arrive(bar()), ptx::tma_load(memory(), &map, bar(), {0, 0});
    __syncthreads();
    ptx::mbarrier_wait(bar(), 0);
    ptx::shared_load<float>(memory());
  });
  dies90("read with no barrier after another thread's write", [&] {  // only thread 0 has waited
    make_bars(1, 1);
    if (thread() == 0) load(map, 8), ptx::mbarrier_wait(bar(), 0);
    ptx::shared_load<float>(memory());
  });
  dies90("written while a copy to it is on its way", [&] {
    make_bars(2, 1);
    if (thread() == 0) load(map, 8), ptx::tma_load(memory(), &map, bar(1), {0, 0});
  });
  dies90("a block ends before its TMA copies landed", [&] {
    make_bars(1, 1);
    if (thread() == 0) load(map, 8);
  });
  dies90("written with no barrier after another thread's read", [&] {  // a stage that is not empty yet
    make_bars(2, 1);
    if (thread() == 0) load(map, 8);
    ptx::mbarrier_wait(bar(), 0);
    ptx::shared_load<float>(memory() + 4 * thread());
    if (thread() == 127) ptx::tma_load(memory(), &map, bar(1), {0, 0});
  });
  dies90("written with no barrier after another thread's read",
         [&] {  // lane 0 arrives for lanes that it did not wait for
           make_bars(1, 1), make_bars(0, 0);
           if (thread() == 0) ptx::mbarrier_init(bar(1), 4);
           __syncthreads();
           if (thread() == 0) load(map, 8);
           ptx::mbarrier_wait(bar(), 0);
           ptx::shared_load<float>(memory() + 4 * thread());
           if (thread() % 32 == 0) ptx::mbarrier_arrive(bar(1));
           if (thread() == 0) ptx::mbarrier_wait(bar(1), 0), load(map, 8), ptx::mbarrier_wait(bar(), 1);
         });
  dies90("a misaligned box", [&] {
    make_bars(1, 1);
    if (thread() == 0) ptx::tma_load(memory() + 64, &map, bar(), {0, 0});
  });
  dies90("another rank", [&] {
    make_bars(1, 1);
    if (thread() == 0) ptx::tma_load(memory(), &map, bar(), {0, 0, 0});
  });
  dies90("outside of shared memory", [&] {
    make_bars(1, 1);
    if (thread() == 0) ptx::tma_load(memory() + 49152 - 512, &map, bar(), {0, 0});
  });
  dies90(
      "behind ordinary stores without fence_async",
      [&] {
        ptx::shared_store(memory() + 16 * (thread() % 64), Vector<uint16_t, 8>{}), __syncthreads();
        if (thread() == 0) ptx::tma_store(&map, memory(), {0, 0});
      },
      64);
  dies90(
      "behind ordinary stores without fence_async",
      [&] {  // by the wrong thread
        ptx::shared_store(memory() + 16 * thread(), Vector<uint16_t, 8>{}), __syncthreads();
        if (thread() == 0) ptx::fence_async(), ptx::tma_store(&map, memory(), {0, 0});
      },
      64);
  dies90(
      "read with no barrier after another thread's write",
      [&] {
        ptx::shared_store(memory() + 16 * thread(), Vector<uint16_t, 8>{}), ptx::fence_async();
        if (thread() == 63) ptx::tma_store(&map, memory(), {0, 0});
      },
      64);
  const auto stored = [&](const std::function<void()>& then) {
    ptx::shared_store(memory() + 16 * thread(), Vector<uint16_t, 8>{}), ptx::fence_async(), __syncthreads();
    if (thread() == 0) ptx::tma_store(&map, memory(), {0, 0}), then();
  };
  dies90(
      "written while a wgmma or a TMA store reads it",
      [&] { stored([] { ptx::tma_store_commit(), ptx::shared_store(memory() + 8, 0.0f); }); }, 64);
  dies90(
      "written with no barrier after a wgmma or a TMA store read it",
      [&] {
        stored([] { ptx::tma_store_commit(), ptx::tma_store_wait<0>(); });
        if (thread() == 32) ptx::shared_store(memory() + 8, 0.0f);
      },
      64);
  dies90("TMA store was committed", [&] { stored([] {}); }, 64);
  dies90("TMA store was waited for", [&] { stored([] { ptx::tma_store_commit(); }); }, 64);
  dies90("TMA store was waited for", [&] { stored([] { ptx::tma_store_commit(), ptx::tma_store_wait<1>(); }); }, 64);
}

void mistakes_of_wgmma() {
  static float d[128][32];
  const auto fill = [] {
    for (int i = thread(); i < 1024; i += 128) ptx::shared_store(memory() + 16 * i, Vector<uint16_t, 8>{});
  };
  const auto descriptor = [](int at) { return ptx::wgmma_descriptor(memory() + at, 8192, 1024); };
  const auto multiply = [=](bool accumulate = false) {
    ptx::wgmma<64>(d[thread()], descriptor(0), descriptor(8192), Float16{}, accumulate);
  };
  const auto ready = [=] { fill(), ptx::fence_async(), __syncthreads(); };
  dies90("without fence_async", [=] { fill(), __syncthreads(), ptx::wgmma_fence(), multiply(); });
  dies90("read with no barrier after another thread's write",
         [=] { fill(), ptx::fence_async(), ptx::wgmma_fence(), multiply(); });
  dies90("read before it was written", [=] { ptx::wgmma_fence(), multiply(); });
  dies90("wgmma without wgmma_fence", [=] { ready(), multiply(); });
  dies90("wgmma without wgmma_fence", [=] {
    ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_commit(), ptx::wgmma_wait<0>();
    d[thread()][3] *= 2;
    multiply(true);
  });
  dies90("accumulators touched while", [=] {
    ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_commit();
    d[thread()][3] *= 2;
    ptx::wgmma_wait<0>();
  });
  dies90("accumulators touched while", [=] {  // one batch is still in flight
    ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_commit(), multiply(true), ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    d[thread()][0] = 1;
    ptx::wgmma_wait<0>();
  });
  dies90("written while a wgmma or a TMA store reads it", [=] {
    ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_commit();
    ptx::shared_store(memory(), 0.0f);
  });
  dies90("written with no barrier after a wgmma or a TMA store read it", [=] {
    ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_commit(), ptx::wgmma_wait<0>();
    if (thread() == 127) ptx::shared_store(memory(), 0.0f);
  });
  dies90("wgmma was waited for", [=] { ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_commit(); });
  dies90("wgmma was waited for", [=] { ready(), ptx::wgmma_fence(), multiply(), ptx::wgmma_wait<0>(); });
  dies90("differ between its threads", [=] {
    ready(), ptx::wgmma_fence();
    ptx::wgmma<64>(d[thread()], descriptor(0), descriptor(thread() < 32 ? 8192 : 0), Float16{}, false);
  });
  dies90("does not start at a swizzled tile", [=] {
    ready(), ptx::wgmma_fence(), ptx::wgmma<64>(d[thread()], descriptor(0), descriptor(512), Float16{}, false);
  });
  dies90("another swizzle", [=] {
    ready(), ptx::wgmma_fence();
    ptx::wgmma<64>(d[thread()], descriptor(0), descriptor(8192) | uint64_t{1} << 63, Float16{}, false);
  });
  dies90("an instruction of a warp that not all its lanes reach", [=] {
    ready();
    if (thread() < 96) ptx::wgmma_fence(), multiply();
  });
  dies90("a warpgroup of fewer than four warps", [=] { ptx::wgmma_fence(), multiply(); }, 64);
}

void maps() {
  TensorMap map;
  const auto encoded = [&](const uint16_t* data, int64_t rows, int64_t cols, int64_t col, int64_t row, int box_cols) {
    const int64_t sizes[2] = {cols, rows}, strides[2] = {2 * col, 2 * row};
    const int box[2] = {box_cols, 8};
    return encode_tensor_map(map, DType::Float16, data, 2, sizes, strides, box);
  };
  expect(encoded(global, 64, 64, 1, 64, 64), "a map");
  expect(!encoded(global + 4, 64, 64, 1, 64, 64), "no map of a misaligned matrix");
  expect(!encoded(global, 64, 64, 1, 68, 64), "no map of misaligned rows");
  expect(!encoded(global, 64, 64, 2, 128, 64), "no map of scattered rows");
  expect(!encoded(global, 0, 64, 1, 64, 64), "no map of nothing");
  expect(!encoded(global, int64_t{1} << 32, 64, 1, 64, 64), "no map of too many rows");
  expect(!encoded(global, 64, 64, 1, int64_t{1} << 39, 64), "no map of too long rows");
  expect(!encoded(global, 64, 64, 1, 64, 32), "no box of another width than the swizzle's");
  expect(!encoded(global, 64, 64, 1, 0, 64), "no map of expanded rows");
  expect(encoded(global, 1, 64, 1, 3, 64), "the stride of one row has no meaning");
  host::machine.no_driver = true;
  expect(!encoded(global, 64, 64, 1, 64, 64), "no map without a driver");
  host::machine.no_driver = false;
}

}  // namespace

int main() {
  host::machine.capability = 90;
  for (const auto order : {host::Machine::Forward, host::Machine::Backward, host::Machine::Shuffled}) {
    host::machine.order = order;
    loads();
    round_trip<3>(), round_trip<4>(), round_trip<5>();
    ring();
    barriers();
    products_of<64>(), products_of<96>(), products_of<128>(), products_of<192>(), products_of<256>();
  }
  host::machine.order = host::Machine::Forward;
  maps();
  mistakes_of_barriers();
  mistakes_of_copies();
  mistakes_of_wgmma();
  std::printf("shim of sm_90a: %d failed\n", failures);
  return failures != 0;
}

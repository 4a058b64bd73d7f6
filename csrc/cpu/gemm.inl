// General matrix product on packed panels: C[m, n] = sum_k A[m, k] B[k, n], shared by every op.
//
// Tiling (BLIS): an MR x NR tile of C lives in registers (6x16 floats on AVX2, 14x32 on AVX-512, 6x8 on SSE2) while the
// micro-kernel runs along K over a panel of A, [depth][MR], and one of B, [depth][NR]. A panel of B (KC x NR, 48 KiB)
// and the block of A (MC x KC) share L2, the packed block of B (KC x NC) lies in L3 and is asked for a panel ahead.
//
// Where the operands come from and where the tile goes is the caller's: A and B are functors that hand out a panel
// (packing it into scratch, or pointing at memory packed before), Store takes the finished tile. So a linear layer, a
// weight gradient and an implicit-GEMM convolution are the same driver.
//
// The order of summation of an element depends on K alone: results are equal for every number of threads.
// Bound by the FMA units once M >= MR. With B packed before, one core of a Zen 3 reached 92-98 GFLOP/s of the 104 probed
// while its neighbours were quiet and 72-85 while they were not (64x2048x2048, 128x768x3072, 1024^3). Asking for the next
// panel of B gained 4-10% there, 20-50% with 4 to 18 rows; asking for the tile of C, or smaller blocks, nothing.
#pragma once

#include "cpu/vec.h"

namespace fastnn::cpu::FASTNN_ISA {

template <class C>
inline constexpr int kNR = 2 * kLanes<C>;
template <class C>
inline constexpr int kMR = FASTNN_VECTOR_REGISTERS == 32 ? 14 : 6;

// K split evenly into blocks of at most `most`, in whole eights.
inline int64_t even_block(int64_t K, int64_t most) {
  const int64_t blocks = (K + most - 1) / most;
  return blocks <= 1 ? K : ((K + blocks - 1) / blocks + 7) / 8 * 8;
}
// Depth of a K block: at most 48 KiB of a B panel. A function of K alone. Deeper than L1 holds: the panel comes from L2
// as fast as it is used, and the tiles of C go to memory and back a third as often as with 16 KiB (1.02-1.1 times as fast).
template <class C>
inline int64_t depth_of_block(int64_t K) {
  return even_block(K, 49152 / (kNR<C> * sizeof(C)));
}

// ---- packing -------------------------------------------------------------------------------------------------------

// Swaps the halves of each group of 2 D lanes between a and b. The lanes are constants of the program text: a mask made
// in a loop costs more than the shuffle.
template <class C, int D, int... LANE>
FASTNN_INLINE void swap_halves(Vec<C>& a, Vec<C>& b, std::integer_sequence<int, LANE...>) {
  using I = Bits<C>;
  constexpr int L = kLanes<C>;
  const Vec<C> low = __builtin_shuffle(a, b, Vec<I>{static_cast<I>(LANE & D ? L + LANE - D : LANE)...});
  b = __builtin_shuffle(a, b, Vec<I>{static_cast<I>(LANE & D ? L + LANE : LANE + D)...});
  a = low;
}
template <class C, int D = kLanes<C> / 2>
FASTNN_INLINE void transpose_in_place(Vec<C>* r) {
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<C>; ++i)
      if (!(i & D)) swap_halves<C, D>(r[i], r[i + D], std::make_integer_sequence<int, kLanes<C>>{});
    transpose_in_place<C, D / 2>(r);
  }
}

// Transposes a block of rows[i][0..lanes), i < rows, into dst[k * width + i], i < ROWS; missing rows are zero. Whole
// vectors are stored.
template <class C, int ROWS = kLanes<C>, class T>
FASTNN_INLINE void pack_transposed(const T* src, int64_t row_stride, int64_t rows, C* dst, int64_t width) {
  constexpr int L = kLanes<C>;
  Vec<C> r[L];
  if (rows >= ROWS) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = i < ROWS ? load(src + i * row_stride) : zero<C>();
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = i < ROWS && i < rows ? load(src + i * row_stride) : zero<C>();
  }
  transpose_in_place<C>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(dst + i * width, r[i]);
}

// dst[k * WIDTH + row] = src[row + k * k_stride] for ROWS rows, then zeros: a few moves of fixed size for each k.
template <int WIDTH, int ROWS, class C>
void pack_runs(const C* src, int64_t k_stride, int64_t depth, C* dst) {
  for (int64_t k = 0; k < depth; ++k, src += k_stride, dst += WIDTH) {
    std::memcpy(dst, src, ROWS * sizeof(C));
    for (int i = ROWS; i < WIDTH; ++i) dst[i] = C(0);
  }
}

// Packs `rows` (<= WIDTH) rows of a strided matrix, X[row, k] = src[row * row_stride + k * k_stride], into
// dst[k * WIDTH + row]; missing rows become zero. Either stride may be anything; unit strides are fast.
template <int WIDTH, class C, class T>
inline void pack_panel(const T* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t depth, C* dst) {
  constexpr int L = kLanes<C>;
  if (row_stride == 1 && rows == WIDTH && WIDTH % L == 0) {
    for (int64_t k = 0; k < depth; ++k)
      for (int i = 0; i < WIDTH; i += L) store(dst + k * WIDTH + i, load(src + k * k_stride + i));
    return;
  }
  if constexpr (std::is_same_v<C, T> && WIDTH % L != 0) {
    if (row_stride == 1) {
      [&]<int... I>(std::integer_sequence<int, I...>) {
        ((rows == I + 1 ? pack_runs<WIDTH, I + 1>(src, k_stride, depth, dst) : void()), ...);
      }(std::make_integer_sequence<int, WIDTH>{});
      return;
    }
  }
  if (row_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      int64_t i = 0;
      for (; i + L <= rows; i += L) store(dst + k * WIDTH + i, load(src + k * k_stride + i));
      for (; i < rows; ++i) dst[k * WIDTH + i] = load_one(src + k * k_stride + i);
      for (; i < WIDTH; ++i) dst[k * WIDTH + i] = C(0);
    }
    return;
  }
  if (k_stride != 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < WIDTH; ++i)
        dst[k * WIDTH + i] = i < rows ? load_one(src + i * row_stride + k * k_stride) : C(0);
    return;
  }
  // Blocks of L rows, the last first: where they do not fill a line of the panel, its vectors overlap the next line, which
  // the first block then writes. The last lines, which have no next, are left to scalars.
  constexpr int BLOCKS = (WIDTH + L - 1) / L;
  constexpr bool overlap = WIDTH % L != 0;
  int64_t k = 0;
  for (; k + L + overlap <= depth; k += L) {
    const auto block = [&]<int ROW>() __attribute__((always_inline)) {
      pack_transposed<C, std::min(WIDTH - ROW, L)>(src + ROW * row_stride + k, row_stride, rows - ROW,
                                                   dst + k * WIDTH + ROW, WIDTH);
    };
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      (block.template operator()<(BLOCKS - 1 - I) * L>(), ...);
    }(std::make_integer_sequence<int, BLOCKS>{});
  }
  for (; k < depth; ++k)
    for (int i = 0; i < WIDTH; ++i) dst[k * WIDTH + i] = i < rows ? load_one(src + i * row_stride + k) : C(0);
}

// Rows split into tiles of at most MR, as evenly as can be: 8 is 4 + 4, since a tile of two rows waits for its own FMAs.
template <class C>
struct RowTiles {
  int64_t rows, count;
  explicit RowTiles(int64_t m) : rows(m), count((m + kMR<C> - 1) / kMR<C>) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
};

// A strided matrix X[row, k] as the driver's A: panels of RowTiles, each [depth][MR], one after the other.
template <class C, class T>
struct StridedA {
  const T* data;
  int64_t row_stride, k_stride;
  const C* panel(int64_t m0, int64_t rows, int64_t k0, int64_t depth, C* scratch) const {
    const RowTiles<C> tiles(rows);
    for (int64_t t = 0; t < tiles.count; ++t)
      pack_panel<kMR<C>>(data + (m0 + tiles.begin(t)) * row_stride + k0 * k_stride, row_stride, k_stride,
                         tiles.begin(t + 1) - tiles.begin(t), depth, scratch + t * kMR<C> * depth);
    return scratch;
  }
};

// What a tile asks for while it multiplies: `first`, and `stride` bytes further every two steps.
struct Ahead {
  const void* first;
  int64_t stride;
};
// Panel [depth][NR] that comes next, shared out between the tiles of this one.
template <class C>
FASTNN_INLINE Ahead next_panel(const C* panel, int64_t depth, int64_t tile, int64_t tiles) {
  constexpr int64_t NR = kNR<C>;
  return {panel + depth * NR * tile / tiles, (2 * NR + tiles - 1) / tiles * int64_t(sizeof(C))};
}

// A strided matrix X[k, n] as the driver's B: panels of NR columns, each [depth][NR].
template <class C, class T>
struct StridedB {
  static constexpr bool kPrepacked = false;
  const T* data;
  int64_t k_stride, col_stride;
  // Panels to pack at a time. Rows along N are read in runs of several: one panel's run would be a single cache line.
  int group() const { return col_stride == 1 ? 4 : 1; }
  // Of what is packed after the panel at n: a line of every second row, or a column.
  Ahead ahead(int64_t n, int64_t k, int64_t tile) const {
    constexpr int64_t NR = kNR<C>;
    const T* const at = col_stride == 1 ? data + n + group() * NR + tile % 2 * k_stride
                                        : data + (n + NR + std::min(tile, NR - 1)) * col_stride;
    return {at + k * k_stride, 2 * k_stride * int64_t(sizeof(T))};
  }
  void pack(int64_t n0, int64_t cols, int64_t k0, int64_t depth, C* dst) const {
    constexpr int64_t NR = kNR<C>, L = kLanes<C>;
    const T* src = data + n0 * col_stride + k0 * k_stride;
    int64_t n = 0;
    if (col_stride == 1 && cols >= 2 * NR) {
      const int64_t whole = cols / NR;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < whole; ++j) {
          C* to = dst + (j * depth + k) * NR;
          store(to, load(src + k * k_stride + j * NR));
          store(to + L, load(src + k * k_stride + j * NR + L));
        }
      n = whole * NR;
    }
    for (; n < cols; n += NR)
      pack_panel<kNR<C>>(src + n * col_stride, col_stride, k_stride, std::min(NR, cols - n), depth, dst + n * depth);
  }
};

// B packed before: K blocks of depth_of_block(K), in each all panels [depth][NR] in order. N is padded to NR.
template <class C>
struct PackedB {
  static constexpr bool kPrepacked = true;
  const C* data;
  int64_t N, K;
  static int64_t size(int64_t N, int64_t K) { return (N + kNR<C> - 1) / kNR<C> * kNR<C> * K; }
  const C* panel(int64_t n0, int64_t k0, int64_t depth) const {
    const int64_t padded = (N + kNR<C> - 1) / kNR<C> * kNR<C>;
    return data + k0 * padded + n0 * depth;
  }
};
template <class C, class B>
void pack_all(const B& b, int64_t N, int64_t K, C* dst, int threads) {
  constexpr int64_t NR = kNR<C>;
  const int64_t KC = depth_of_block<C>(K), padded = (N + NR - 1) / NR * NR, group = b.group() * NR;
  parallel(worth_threads(threads, 0, 1.0 * sizeof(C) * N * K), [&](int thread, int running) {
    const Range columns = share(N, group, thread, running);
    for (int64_t k = 0; k < K; k += KC) {
      const int64_t depth = std::min(KC, K - k);
      for (int64_t n = columns.begin; n < columns.end; n += group)
        b.pack(n, std::min(group, N - n), k, depth, dst + k * padded + n * depth);
    }
  });
}

// ---- micro-kernel --------------------------------------------------------------------------------------------------

// A tile of C in registers.
template <class C, int ROWS>
struct Tile {
  Vec<C> acc[ROWS][2];
};

// tile[i][:] += a[i] * b[:]
template <class C, int ROWS>
FASTNN_INLINE void micro_step(const C* __restrict a, const C* __restrict b, Tile<C, ROWS>& tile) {
  const Vec<C> b0 = load(b), b1 = load(b + kLanes<C>);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    const Vec<C> x = splat<C>(a[i]);
    tile.acc[i][0] = fma(x, b0, tile.acc[i][0]);
    tile.acc[i][1] = fma(x, b1, tile.acc[i][1]);
  }
}

// tile[i][:] = sum over k < depth of a[k * MR + i] * b[k * NR + :], for the first ROWS rows of the panel of A. Meanwhile
// what lies ahead is asked for. (Two steps a turn: with four or eight the loop is slower, for all its fewer instructions.)
template <class C, int ROWS>
FASTNN_INLINE void micro_kernel(int64_t depth, const C* __restrict a, const C* __restrict b, const Ahead& ahead,
                                Tile<C, ROWS>& tile) {
  constexpr int MR = kMR<C>, NR = kNR<C>;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) tile.acc[i][0] = tile.acc[i][1] = zero<C>();
  const char* next = static_cast<const char*>(ahead.first);
  for (int64_t k = 0; k + 2 <= depth; k += 2, a += 2 * MR, b += 2 * NR, next += ahead.stride) {
    __builtin_prefetch(next, 0, 2);
    micro_step<C, ROWS>(a, b, tile);
    micro_step<C, ROWS>(a + MR, b + NR, tile);
  }
  if (depth % 2) micro_step<C, ROWS>(a, b, tile);
}

// The same on operands in place: rows of A at a + i * lda, of B at b + k * ldb, elements of a row next to each other.
template <class C, int ROWS>
FASTNN_INLINE void micro_kernel_strided(int64_t depth, const C* __restrict a, int64_t lda, const C* __restrict b,
                                        int64_t ldb, Tile<C, ROWS>& tile) {
  constexpr int L = kLanes<C>;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) tile.acc[i][0] = tile.acc[i][1] = zero<C>();
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    const Vec<C> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<C> x = splat<C>(a[i * lda + k]);
      tile.acc[i][0] = fma(x, b0, tile.acc[i][0]);
      tile.acc[i][1] = fma(x, b1, tile.acc[i][1]);
    }
  }
}

// Calls f(std::integral_constant<int, ROWS>) with the smallest compiled tile height that holds `rows` (1 … MR).
template <class C, class F>
FASTNN_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (kMR<C> == 6) {
    switch (rows) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 5: return f(std::integral_constant<int, 5>{});
      default: return f(std::integral_constant<int, 6>{});
    }
  } else {
    static_assert(kMR<C> == 14);
    if (rows <= 1) return f(std::integral_constant<int, 1>{});
    if (rows <= 2) return f(std::integral_constant<int, 2>{});
    if (rows <= 4) return f(std::integral_constant<int, 4>{});
    if (rows <= 6) return f(std::integral_constant<int, 6>{});
    if (rows <= 8) return f(std::integral_constant<int, 8>{});
    if (rows <= 11) return f(std::integral_constant<int, 11>{});
    return f(std::integral_constant<int, 14>{});
  }
}

// ---- driver --------------------------------------------------------------------------------------------------------

// What a Store is told of a tile: `rows` x `cols` at (m, n) of C. While K is not finished the sums of the blocks so far
// are kept in `partial` (row stride `partial_stride`): of C itself where C has the compute type, else of a scratch block.
template <class C>
struct TilePlace {
  int64_t m, n, rows, cols;
  bool first, last;  // first and last block of K
  C* partial;
  int64_t partial_stride;
};

// A Store has
//   C* in_place(m, n, &stride)                   C itself where partial sums may lie there, else nullptr
//   void finish(place, const C* tile)            takes finished sums, tile[i * NR + j]: bias, activation, conversion
//   template <ROWS> bool direct(place, Tile&)    may take full-width finished sums straight from registers
template <class C, int ROWS, class Store>
FASTNN_INLINE void store_tile(Tile<C, ROWS>& tile, const TilePlace<C>& place, const Store& store_to) {
  constexpr int NR = kNR<C>, L = kLanes<C>;
  const int64_t rows = std::min<int64_t>(place.rows, ROWS);
  const bool full = place.cols == NR;
  if (!place.first) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i >= rows) break;
      const C* p = place.partial + i * place.partial_stride;
      tile.acc[i][0] += full ? load(p) : load_first(p, place.cols);
      if (full || place.cols > L) tile.acc[i][1] += full ? load(p + L) : load_first(p + L, place.cols - L);
    }
  }
  if (!place.last) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i >= rows) break;
      C* p = place.partial + i * place.partial_stride;
      if (full) {
        store(p, tile.acc[i][0]);
        store(p + L, tile.acc[i][1]);
      } else {
        store_first(p, tile.acc[i][0], place.cols);
        if (place.cols > L) store_first(p + L, tile.acc[i][1], place.cols - L);
      }
    }
    return;
  }
  if (full && store_to.direct(place, tile)) return;
  alignas(64) C buffer[ROWS * NR];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    store(buffer + i * NR, tile.acc[i][0]);
    store(buffer + i * NR + L, tile.acc[i][1]);
  }
  store_to.finish(place, buffer);
}

// Working memory of one gemm_region call, in elements of C.
struct Blocking {
  int64_t KC, MC, NC, MS;  // depth of a K block, rows of an A block, columns of a B block, rows of a super-block
  bool keep_b;             // the B block is packed once and read again by the next A block
  int64_t a_size, b_size, partial_size;
};
template <class C>
inline Blocking blocking(int64_t M, int64_t N, int64_t K, int64_t KC, bool in_place, int64_t group) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  Blocking s;
  s.KC = KC;
  const int64_t depth = std::max<int64_t>(s.KC, 1);
  // A block of A: half of a 512 KiB L2 where that is all of A, else even blocks of less, so that caches that others use
  // too do not lose it.
  const int64_t blocks = M * depth * int64_t(sizeof(C)) <= 262144 ? 1 : M * depth * int64_t(sizeof(C)) / 163840 + 1;
  s.MC = std::max<int64_t>(((M + blocks - 1) / blocks + MR - 1) / MR * MR, MR);
  // All of B in L2: few rows at a time and all columns, so that C is written along its rows (a panel's way down the rows
  // of a wide C meets a new page in each).
  if (N * depth * int64_t(sizeof(C)) <= 196608) s.MC = std::min(s.MC, 4 * MR);
  s.NC = std::max<int64_t>(4194304 / (depth * sizeof(C)) / NR * NR, NR);  // some MiB of L3
  s.MS = M;
  s.keep_b = M > s.MC;
  s.partial_size = 0;
  if (!in_place && s.KC < K) {  // partial sums in scratch: bound their block
    s.MS = std::min(M, 4 * s.MC);
    s.NC = std::max<int64_t>(std::min<int64_t>(s.NC, 1048576 / (s.MS * sizeof(C)) / NR * NR), NR);
  }
  s.NC = std::min(s.NC, (N + NR - 1) / NR * NR);
  if (!in_place && s.KC < K) s.partial_size = s.MS * s.NC;
  s.a_size = s.MC * depth;
  s.b_size = (s.keep_b ? s.NC : std::min(group * NR, s.NC)) * depth;
  return s;
}

// Whether f takes an operand: what only some have, asked in C++17, with which older torch compiles extensions.
template <class B, class F>
constexpr bool takes(const F&) {
  return std::is_invocable_v<F, const B&>;
}

// Serial: the region [m_begin, m_end) x [n_begin, n_end) of C. With `accumulate` (where the store is in place) the
// product is added to what is there.
template <class C, class A, class B, class Store>
void gemm_region(int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end, int64_t K, const A& a, const B& b,
                 const Store& store_to, bool accumulate) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  if (m_begin >= m_end || n_begin >= n_end) return;
  int64_t c_stride = 0;
  const bool in_place = store_to.in_place(m_begin, n_begin, c_stride) != nullptr;
  int64_t group = 1;  // of panels of B
  if constexpr (!B::kPrepacked) group = b.group();
  int64_t KC = depth_of_block<C>(K);
  if constexpr (takes<B>([](const auto& x) -> std::void_t<decltype(x.kDepth)> {}))
    KC = even_block(K, B::kDepth);  // of a B that takes memory to pack
  const Blocking s = blocking<C>(m_end - m_begin, n_end - n_begin, K, KC, in_place, group);
  Scratch<C> memory(s.a_size + s.b_size + s.partial_size);
  C *const a_block = memory, *const b_block = a_block + s.a_size, *const partial = b_block + s.b_size;

  for (int64_t ms = m_begin; ms < m_end; ms += s.MS) {
    const int64_t ms_end = std::min(ms + s.MS, m_end);
    for (int64_t nc = n_begin; nc < n_end; nc += s.NC) {
      const int64_t nc_end = std::min(nc + s.NC, n_end);
      int64_t k = 0;
      do {  // once even for K = 0: bias and activation of an empty sum
        const int64_t depth = std::min(s.KC, K - k);
        for (int64_t mc = ms; mc < ms_end; mc += s.MC) {
          const int64_t mc_end = std::min(mc + s.MC, ms_end);
          const C* a_packed = a.panel(mc, mc_end - mc, k, depth, a_block);
          for (int64_t n = nc; n < nc_end; n += NR) {
            TilePlace<C> place;
            place.n = n;
            place.cols = std::min(NR, nc_end - n);
            place.first = k == 0 && !accumulate;
            place.last = k + depth >= K;
            const C* b_packed;
            if constexpr (B::kPrepacked) {
              b_packed = b.panel(n, k, depth);
            } else {
              const int64_t in_group = (n - nc) / NR % group;
              C* const b_at = b_block + (s.keep_b ? n - nc : in_group * NR) * depth;
              if (in_group == 0 && (mc == ms || !s.keep_b)) b.pack(n, std::min(group * NR, nc_end - n), k, depth, b_at);
              b_packed = b_at;
            }
            const RowTiles<C> tiles(mc_end - mc);
            for (int64_t t = 0; t < tiles.count; ++t) {
              const int64_t m = mc + tiles.begin(t);
              place.m = m;
              place.rows = mc + tiles.begin(t + 1) - m;
              if (in_place) {
                place.partial = store_to.in_place(m, n, c_stride);
                place.partial_stride = c_stride;
              } else {
                place.partial = partial + (m - ms) * s.NC + (n - nc);
                place.partial_stride = s.NC;
              }
              Ahead ahead = next_panel(b_packed + depth * NR, depth, t, tiles.count);
              if constexpr (takes<B>([](const auto& x) -> std::void_t<decltype(x.ahead(0, 0, 0))> {}))
                if ((mc == ms || !s.keep_b) && n + group * NR < nc_end) ahead = b.ahead(n, k, t);
              with_rows<C>(place.rows, [&](auto height) __attribute__((always_inline)) {
                constexpr int ROWS = decltype(height)::value;
                Tile<C, ROWS> tile;
                micro_kernel<C, ROWS>(depth, a_packed + t * MR * depth, b_packed, ahead, tile);
                store_tile<C, ROWS>(tile, place, store_to);
              });
            }
          }
        }
        k += std::max<int64_t>(depth, 1);
      } while (k < K);
    }
  }
}

// Splits C into a grid of one region a thread, as square as the panels to be packed ask for.
template <class C, class A, class B, class Store>
void gemm(int64_t M, int64_t N, int64_t K, const A& a, const B& b, const Store& store_to, int threads,
          bool accumulate = false) {
  threads = worth_threads(threads, 2.0 * M * N * K, 1.0 * sizeof(C) * (M * K + N * K + M * N) / 4);
  parallel(threads, [&](int thread, int running) {
    // Each thread packs its own rows of A and columns of B, so the grid that packs least wins.
    int best = 1;
    double least = 1e300;
    for (int rows = 1; rows <= running; ++rows) {
      if (running % rows) continue;
      const double cost = double(M) / rows + double(N) / (running / rows);
      const bool too_thin = (rows > 1 && M < rows * kMR<C>) || (running / rows > 1 && N < running / rows * kNR<C>);
      if (cost + (too_thin ? 1e200 : 0) < least) least = cost + (too_thin ? 1e200 : 0), best = rows;
    }
    const Range m = share(M, kMR<C>, thread % best, best);
    const Range n = share(N, kNR<C>, thread / best, running / best);
    gemm_region<C>(m.begin, m.end, n.begin, n.end, K, a, b, store_to, accumulate);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

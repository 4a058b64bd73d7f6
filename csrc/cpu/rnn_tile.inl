// What the recurrent kernels multiply with: tiles of a few rows by a panel of weights, rows left where they lie.
//
// A panel holds NV vectors for each k, [K][NV][lanes]: the gates of the same units next to each other, so that the
// pointwise part finds all of them together. The tile is 12 (AVX-512: 24) vectors: 3 x 4 gates (LSTM), 4 x 3 (GRU),
// 6 x 2 (RNN, gradients). A batch of one is bound by the loads of the panel (L2: 32 bytes a cycle on Zen 3); several sums
// over interleaved k hide the latency of the FMA there.
#pragma once

#include "cpu/gemm.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <int NV>
inline constexpr int kRnnRows = (FASTNN_VECTOR_REGISTERS == 32 ? 24 : 12) / NV;

// Sums of interleaved k that keep both FMA pipes busy when the tile alone has too few accumulators.
template <int ROWS, int NV>
inline constexpr int kRnnUnroll = ROWS * NV >= 8   ? 1
                                  : ROWS * NV >= 4 ? 2
                                                   : 4;

// acc[i][v] = sum over k of rows[i][k] * panel[k][v], as UNROLL sums over interleaved k. A whole tile asks for `ahead`
// meanwhile; with fewer rows there is no time to spare (one row: 0.93 of the speed).
template <class C, int ROWS, int NV, int UNROLL>
FASTNN_INLINE void rnn_tile(int64_t depth, const C* const* rows, const C* __restrict panel, const Ahead& ahead,
                            Vec<C> (&acc)[ROWS][NV]) {
  constexpr int L = kLanes<C>;
  Vec<C> sum[UNROLL][ROWS][NV];
  const C* row[ROWS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) row[i] = rows[i];
#pragma GCC unroll 48
  for (int i = 0; i < UNROLL * ROWS * NV; ++i) (&sum[0][0][0])[i] = zero<C>();
  int64_t k = 0;
  const char* next = static_cast<const char*>(ahead.first);
  for (; k + UNROLL <= depth; k += UNROLL, panel += UNROLL * NV * L, next += UNROLL * ahead.stride) {
    if constexpr (ROWS == kRnnRows<NV>) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) {
      // Whichever operand is smaller stays in registers: with 12 sums of 16 registers there is no room for both.
      if constexpr (ROWS < NV) {
        Vec<C> x[ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) x[i] = splat<C>(row[i][k + u]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const Vec<C> b = load(panel + (u * NV + v) * L);
#pragma GCC unroll 12
          for (int i = 0; i < ROWS; ++i) sum[u][i][v] = fma(x[i], b, sum[u][i][v]);
        }
      } else {
        Vec<C> b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) b[v] = load(panel + (u * NV + v) * L);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
          const Vec<C> x = splat<C>(row[i][k + u]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) sum[u][i][v] = fma(x, b[v], sum[u][i][v]);
        }
      }
    }
  }
  for (; k < depth; ++k, panel += NV * L)
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[0][i][v] = fma(splat<C>(row[i][k]), load(panel + v * L), sum[0][i][v]);
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if constexpr (UNROLL == 4) acc[i][v] = (sum[0][i][v] + sum[1][i][v]) + (sum[2][i][v] + sum[3][i][v]);
      if constexpr (UNROLL == 2) acc[i][v] = sum[0][i][v] + sum[1][i][v];
      if constexpr (UNROLL == 1) acc[i][v] = sum[0][i][v];
    }
}

// Calls f(std::integral_constant<int, HEIGHT>) with the smallest compiled tile height that holds `rows` (1 … MOST).
template <int MOST, class F>
FASTNN_INLINE void with_height(int64_t rows, const F& f) {
  if (MOST >= 2 && rows == 2) return f(std::integral_constant < int, MOST<2 ? MOST : 2>{});
  if (MOST >= 3 && rows == 3) return f(std::integral_constant < int, MOST<3 ? MOST : 3>{});
  if (MOST >= 4 && rows == 4) return f(std::integral_constant < int, MOST<4 ? MOST : 4>{});
  if (MOST >= 6 && (rows == 5 || rows == 6)) return f(std::integral_constant < int, MOST<6 ? MOST : 6>{});
  if (MOST >= 8 && (rows == 7 || rows == 8)) return f(std::integral_constant < int, MOST<8 ? MOST : 8>{});
  if (rows > 8) return f(std::integral_constant<int, MOST>{});
  return f(std::integral_constant<int, 1>{});
}

enum class RnnSum { Set, Add, Bias };  // what becomes of dst: the product, dst + product, bias + product

// dst[i][slot(v)] for `rows` rows of any number, in blocks of kRnnRows from row 0. The order of summation of an element
// depends on its place in the block only where SPLIT_K is set, and there blocks never depend on the number of threads.
// LAST_SLOT: where the last vector goes (GRU keeps W_hn h apart from W_in x).
template <class C, int NV, int LAST_SLOT, bool SPLIT_K, RnnSum SUM>
__attribute__((noinline)) void rnn_product(int64_t rows, int64_t depth, const C* const* a, const C* panel, C* dst,
                                           int64_t dst_stride, const C* bias) {
  constexpr int L = kLanes<C>, MR = kRnnRows<NV>;
  const int64_t tiles = std::max<int64_t>(rows / MR, 1);
  for (int64_t r = 0; r < rows; r += MR) {
    const int64_t count = std::min<int64_t>(MR, rows - r);
    const C* clamped[MR];
    for (int i = 0; i < MR; ++i) clamped[i] = a[r + std::min<int64_t>(i, count - 1)];
    // The next panel, which the whole tiles share out.
    const Ahead ahead = {panel + depth * NV * L * (tiles + r / MR) / tiles,
                         (NV * L + tiles - 1) / tiles * int64_t(sizeof(C))};
    with_height<MR>(count, [&](auto height) {
      constexpr int ROWS = decltype(height)::value;
      Vec<C> acc[ROWS][NV];
      rnn_tile<C, ROWS, NV, SPLIT_K ? kRnnUnroll<ROWS, NV> : 1>(depth, clamped, panel, ahead, acc);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        if (i >= count) break;
        C* out = dst + (r + i) * dst_stride;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const int slot = v == NV - 1 ? LAST_SLOT : v;
          if constexpr (SUM == RnnSum::Set) store(out + slot * L, acc[i][v]);
          if constexpr (SUM == RnnSum::Add) store(out + slot * L, load(out + slot * L) + acc[i][v]);
          if constexpr (SUM == RnnSum::Bias) store(out + slot * L, load(bias + slot * L) + acc[i][v]);
        }
        if constexpr (SUM == RnnSum::Bias && NV == 3) store(out + 3 * L, load(bias + 3 * L));
      }
    });
  }
}

// ---- storage types: everything but these few functions sees the compute type alone -----------------------------------

template <class C, class F>
FASTNN_INLINE void rnn_with_storage(DType dtype, const F& f) {
  if constexpr (std::is_same_v<C, double>) {
    f(double{});
  } else {
    if (dtype == DType::Float32) f(float{});
    if (dtype == DType::BFloat16) f(BFloat16{});
    if (dtype == DType::Float16) f(Float16{});
  }
}
inline int64_t rnn_bytes(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }
inline const void* rnn_at(const void* p, DType dtype, int64_t index) {
  return static_cast<const char*>(p) + index * rnn_bytes(dtype);
}
inline void* rnn_at(void* p, DType dtype, int64_t index) { return static_cast<char*>(p) + index * rnn_bytes(dtype); }

template <class C>
__attribute__((noinline)) void rnn_widen(DType dtype, const void* from, int64_t count, C* dst) {
  rnn_with_storage<C>(dtype, [&](auto t) {
    const auto* src = static_cast<const decltype(t)*>(from);
    int64_t i = 0;
    for (; i + kLanes<C> <= count; i += kLanes<C>) store(dst + i, load(src + i));
    for (; i < count; ++i) dst[i] = load_one(src + i);
  });
}
template <class C>
__attribute__((noinline)) void rnn_narrow(DType dtype, const C* src, int64_t count, void* to) {
  rnn_with_storage<C>(dtype, [&](auto t) {
    auto* dst = static_cast<decltype(t)*>(to);
    int64_t i = 0;
    for (; i + kLanes<C> <= count; i += kLanes<C>) store(dst + i, load(src + i));
    for (; i < count; ++i) store_one(dst + i, src[i]);
  });
}

// Packs `count` vectors of rows of W into a panel: dst[(k * count + v) * kLanes + lane] = W[row[v] + lane, k] for
// lane < lanes[v], zero beyond. Whole cache lines of all vectors together, so that each line is read and written once;
// they come from more rows than a hardware prefetcher follows, so the lines two further are asked for (1.2 to 1.5 times
// as fast a cell of 24 rows).
template <class C>
__attribute__((noinline)) void rnn_pack_panel(DType dtype, const void* from, int64_t ld, int count, const int64_t* row,
                                              const int64_t* lanes, int64_t depth, C* dst) {
  constexpr int L = kLanes<C>;
  constexpr int64_t line = std::max<int64_t>(64 / sizeof(C), L);
  rnn_with_storage<C>(dtype, [&](auto t) {
    const auto* w = static_cast<const decltype(t)*>(from);
    for (int64_t k0 = 0; k0 < depth; k0 += line) {
      const int64_t end = std::min(k0 + line, depth);
      for (int v = 0; v < count; ++v) {
        const auto* rows = w + row[v] * ld;
        for (int64_t i = 0; i < lanes[v]; ++i)
          __builtin_prefetch(rows + i * ld + k0 + 2 * line, 0, 2);  // to L2: rows of 4 KiB meet in one set of L1
        int64_t k = k0;
        if (lanes[v] == L)
          for (; k + L <= end; k += L) pack_transposed<C>(rows + k, ld, L, dst + (k * count + v) * L, count * L);
        for (; k < end; ++k)
          for (int64_t i = 0; i < L; ++i)
            dst[(k * count + v) * L + i] = i < lanes[v] ? load_one(rows + i * ld + k) : C(0);
      }
    }
  });
}

// Packs columns [0, cols) of W, its rows `ld` apart, into panels [depth][2 lanes]; missing columns become zero. Four panels
// at a time: one panel's run of a row is a cache line, or half of one.
template <class C>
__attribute__((noinline)) void rnn_pack_columns(DType dtype, const void* from, int64_t ld, int64_t cols, int64_t depth,
                                                C* dst) {
  constexpr int64_t L = kLanes<C>, WIDTH = 2 * L, GROUP = 4 * WIDTH;
  rnn_with_storage<C>(dtype, [&](auto t) {
    for (int64_t n0 = 0; n0 < cols; n0 += GROUP) {
      const int64_t end = std::min(n0 + GROUP, cols);
      for (int64_t k = 0; k < depth; ++k) {
        const auto* row = static_cast<const decltype(t)*>(from) + k * ld;
        for (int64_t n = n0; n < end; n += WIDTH) {
          C* to = dst + n * depth + k * WIDTH;
          store(to, load_first(row + n, end - n));
          store(to + L, end - n > L ? load_first(row + n + L, end - n - L) : zero<C>());
        }
      }
    }
  });
}

// r[0][j] = sum of the lanes of r[j]. Each round halves the vectors: of a pair, the lanes without bit D go on with the
// first, those with it with the second.
template <class C, int D = kLanes<C> / 2>
FASTNN_INLINE void rnn_sum_lanes(Vec<C>* r) {
  if constexpr (D > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) {
      swap_halves<C, D>(r[i], r[i + D], std::make_integer_sequence<int, kLanes<C>>{});
      r[i] += r[i + D];
    }
    rnn_sum_lanes<C, D / 2>(r);
  }
}

// y[i] lane j: sum over k of row[j][k] * x[i][k] for X (1 or 2) vectors x and a vector's worth of rows, nothing packed.
// Two vectors at once need fewer loads than multiplications; the sums are the same to the last bit.
template <class C, int X, class T>
FASTNN_INLINE void rnn_dots_of(const T* const* row, int64_t depth, const C* const* x, Vec<C>* y) {
  constexpr int L = kLanes<C>, UNROLL = L >= 8 ? 1 : 8 / L, ROWS = L / X;
  const int64_t whole = depth / L * L;
  alignas(64) C tail[L][L] = {};
  for (int j = 0; j < L && whole < depth; ++j)
    for (int64_t k = whole; k < depth; ++k) tail[j][k - whole] = load_one(row[j] + k);
  for (int group = 0; group < X; ++group, row += ROWS) {
    Vec<C> sum[UNROLL][L], v[X];
#pragma GCC unroll 16
    for (int i = 0; i < UNROLL * L; ++i) (&sum[0][0])[i] = zero<C>();
    const auto add = [&](int u, int64_t k) {
#pragma GCC unroll 2
      for (int i = 0; i < X; ++i) v[i] = load(x[i] + k);
#pragma GCC unroll 16
      for (int j = 0; j < ROWS; ++j) {
        const Vec<C> w = load(row[j] + k);
#pragma GCC unroll 2
        for (int i = 0; i < X; ++i) sum[u][i * ROWS + j] = fma(v[i], w, sum[u][i * ROWS + j]);
      }
    };
    int64_t k = 0;
    for (; k + UNROLL * L <= depth; k += UNROLL * L)
#pragma GCC unroll 4
      for (int u = 0; u < UNROLL; ++u) add(u, k + u * L);
    for (; k + L <= depth; k += L) add(0, k);
    if (k < depth) {
#pragma GCC unroll 2
      for (int i = 0; i < X; ++i) v[i] = load_first(x[i] + k, depth - k);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) sum[0][j] = fma(v[j / ROWS], load(tail[group * ROWS + j % ROWS]), sum[0][j]);
    }
#pragma GCC unroll 4
    for (int u = 1; u < UNROLL; ++u)
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) sum[0][j] += sum[u][j];
    rnn_sum_lanes<C>(sum[0]);
    y[group] = sum[0][0];
  }
  if constexpr (X == 2) swap_halves<C, L / 2>(y[0], y[1], std::make_integer_sequence<int, L>{});
}

// out[i * out_stride] (+)= those dots for each of `rows` vectors x, `lanes` rows of w; lanes beyond are undefined.
template <class C>
__attribute__((noinline)) void rnn_dots(DType dtype, const void* w, int64_t ld, int64_t lanes, int64_t depth,
                                        int64_t rows, const C* const* x, C* out, int64_t out_stride, bool add) {
  rnn_with_storage<C>(dtype, [&](auto t) {
    constexpr int L = kLanes<C>;
    const decltype(t)* row[L];
    for (int j = 0; j < L; ++j) row[j] = static_cast<const decltype(t)*>(w) + std::min<int64_t>(j, lanes - 1) * ld;
    const auto put = [&](Vec<C> y) {
      store(out, add ? load(out) + y : y);
      out += out_stride;
    };
    Vec<C> y[2];
    for (; rows >= 2; rows -= 2, x += 2) {
      rnn_dots_of<C, 2>(row, depth, x, y);
      put(y[0]);
      put(y[1]);
    }
    if (rows) {
      rnn_dots_of<C, 1>(row, depth, x, y);
      put(y[0]);
    }
  });
}

// All bits of lane i set where mask[i] is not zero, i < count; nothing is read beyond.
template <class C>
FASTNN_INLINE Vec<Bits<C>> rnn_mask(const uint8_t* mask, int64_t count) {
  alignas(64) Bits<C> lanes[kLanes<C>] = {};
  if (count >= kLanes<C>)
    for (int i = 0; i < kLanes<C>; ++i) lanes[i] = -Bits<C>(mask[i] != 0);
  else
    for (int64_t i = 0; i < count; ++i) lanes[i] = -Bits<C>(mask[i] != 0);
  Vec<Bits<C>> wide;
  __builtin_memcpy(&wide, lanes, sizeof wide);
  return wide;
}

// The rows of a sequence: how many at a step, and where they begin.
class RnnRows {
 public:
  explicit RnnRows(const RnnParams& p) : batch_(p.batch), sizes_(p.batch_sizes), first_(sizes_ ? p.steps : 0) {
    for (int64_t t = 0, row = 0; sizes_ && t < p.steps; row += sizes_[t++]) first_[t] = row;
  }
  int64_t count(int64_t t) const { return sizes_ ? sizes_[t] : batch_; }
  int64_t first(int64_t t) const { return sizes_ ? first_[t] : t * batch_; }
  const void* input(const RnnParams& p, int64_t t, int64_t i) const {
    return rnn_at(p.input, p.dtype, (sizes_ ? first_[t] * p.stride_batch : t * p.stride_step) + i * p.stride_batch);
  }

 private:
  int64_t batch_;
  const int64_t* sizes_;
  Scratch<int64_t> first_;
};

// What a thread of a direction does: rows [row_begin, row_end) of each step, and its share of the hidden units.
struct RnnShare {
  int64_t row_begin, row_end;
  int part, parts;  // of the units; parts > 1 need a barrier a step
  bool idle;
};

// Rows apart need no barrier; units apart keep each thread's weights in its own cache. A step must be long enough to
// repay the barrier (about half a microsecond).
inline RnnShare rnn_share(const RnnParams& p, int64_t gates, int tile_rows, int64_t panels, int rank, int ranks) {
  const RnnShare whole = {0, p.batch, 0, 1, rank > 0};
  if (ranks == 1) return whole;
  const int64_t blocks = (p.batch + tile_rows - 1) / tile_rows;
  const Range r = share(p.batch, tile_rows, rank, ranks);
  const RnnShare rows = {r.begin, r.end, 0, 1, r.begin >= r.end};
  if (p.normed()) return blocks > 1 ? rows : whole;  // a row is normalised over all of its units
  const double step = double(p.batch) * gates * p.hidden_size * p.state_size;
  const bool even = blocks >= 8 * ranks || blocks % ranks == 0;
  const bool light = gates * p.hidden_size * p.state_size <= 65536;
  if (blocks >= ranks && ((even && light && !p.batch_sizes) || step < 5e4)) return rows;
  if (step < 5e4) return whole;
  const int parts = static_cast<int>(std::min<int64_t>(ranks, panels));
  return {0, p.batch, rank, parts, rank >= parts};
}

// Calls f(thread's direction, rank in it, threads in it): directions side by side where there are threads for both.
// `alone`: a second thread of one direction would have nothing to do.
template <class F>
void rnn_parallel(int threads, int directions, bool alone, const F& f) {
  if (alone) threads = std::min(threads, directions);
  parallel(threads, [&](int thread, int running) {
    if (running == 1 || directions == 1) {
      for (int d = 0; d < directions; ++d) f(d, thread, running);
      return;
    }
    const int first = (running + 1) / 2;
    thread < first ? f(0, thread, first) : f(1, thread - first, running - first);
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

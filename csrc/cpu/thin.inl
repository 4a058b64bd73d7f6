// Products with few rows: arithmetic is nothing, traffic everything. W streams once along its rows into accumulators in L1,
// a gradient dW streams out. Bound by memory.
#pragma once

#include "cpu/gemm.inl"

namespace fastnn::cpu::FASTNN_ISA {

inline constexpr int64_t kThinRows = 8;

// Calls f(number of rows, from 1 to kThinRows, as std::integral_constant).
template <class F>
void with_thin_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// Calls f(k) for vectors that cover [begin, end): the last one starts where it ends with the range, over lanes of the
// one before. There must be a vector's worth of elements.
template <class C, class F>
FASTNN_INLINE void for_each_vector(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t L = kLanes<C>;
  int64_t k = begin;
  for (; k + L <= end; k += L) f(k);
  if (k < end) f(end - L);
}

// Width of the blocks of columns: their accumulators take 16 KiB of L1, 32 KiB where that would make the rows of W short.
template <int ROWS, class C>
inline constexpr int64_t kThinColumns = std::max(4096 / ROWS, 1024) / 64 * 64 * 4 / int64_t(sizeof(C));

// Whom a block's sums are handed to, by reference: the loop that makes them is compiled once for all.
template <class C>
class ThinFinish {
 public:
  template <class F>
  ThinFinish(const F& f)
      : f_(&f), call_([](const void* f, int64_t from, int64_t to, const C* sums, int64_t width) {
          (*static_cast<const F*>(f))(from, to, sums, width);
        }) {}
  void operator()(int64_t from, int64_t to, const C* sums, int64_t width) const { call_(f_, from, to, sums, width); }

 private:
  const void* f_;
  void (*call_)(const void*, int64_t, int64_t, const C*, int64_t);
};

// Σ over n < N of g[m, n] w[n, k] for k in [begin, end), at least a vector; rows lie *_row apart. Columns go in blocks, of
// whose sums finish(from, to, sums, width) is told: that of (m, k) is sums[m * width + k - from], and the vectors that hold
// a row's sums may be read whole.
//
// Eight rows of W at a time, each a run of some KiB that the prefetchers follow. A few vectors down all of W, sums in
// registers, took 1.5 to 2 times as long: a new page for each row. The eight are added up before they meet the sum so far,
// which keeps the chain of roundings short; an element's order of summation is that of N alone.
template <int ROWS, class C, class T>
__attribute__((noinline)) void thin_product(int64_t N, int64_t begin, int64_t end, const C* g, int64_t g_row,
                                            const T* w, int64_t w_row, ThinFinish<C> finish) {
  constexpr int64_t L = kLanes<C>, kColumns = kThinColumns<ROWS, C>;
  constexpr int64_t kWidth = kColumns + 2 * L + 64 / int64_t(sizeof(C));  // rows of sums do not meet in one set of L1
  alignas(64) C sums[ROWS * kWidth];
  for (int64_t from = begin, to; from < end; from = to) {
    to = end - from < kColumns + L ? end : from + kColumns;  // a rest of less than a vector stays with the block before
    const int64_t whole = (to - from) / L * L, tail = to - from - whole;
    for (int64_t m = 0; m < ROWS; ++m)
      for (int64_t j = 0; j < whole + L; j += L) store(sums + m * kWidth + j, zero<C>());
    const auto rows = [&](int64_t n, auto count) __attribute__((always_inline)) {
      constexpr int STEP = decltype(count)::value;
      Vec<C> x[ROWS][STEP];
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
        for (int i = 0; i < STEP; ++i) x[m][i] = splat<C>(g[m * g_row + n + i]);
      const auto columns = [&](const T* at, C* sum) __attribute__((always_inline)) {
        Vec<C> part[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < STEP; ++i) {
          const Vec<C> v = load(at + i * w_row);
#pragma GCC unroll 8
          for (int m = 0; m < ROWS; ++m) part[m] = i ? fma(x[m][i], v, part[m]) : x[m][i] * v;
        }
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) store(sum + m * kWidth, load(sum + m * kWidth) + part[m]);
      };
      const T* const at = w + n * w_row + from;
      for (int64_t j = 0; j < whole; j += L) columns(at + j, sums + j);
      if (tail) columns(at + whole + tail - L, sums + whole);  // a vector that ends with the row
    };
    int64_t n = 0;
    for (; n + 8 <= N; n += 8) rows(n, std::integral_constant<int, 8>{});
    for (; n < N; ++n) rows(n, std::integral_constant<int, 1>{});
    if (tail)
      for (int64_t m = 0; m < ROWS; ++m) {
        C* const row = sums + m * kWidth + whole;
        store(row + tail - L, load(row));  // over lanes that hold the same sums
      }
    finish(from, to, sums, kWidth);
  }
}

// out[m, k] (+)= Σ over n < N of g[m, n] w[n, k], as above.
template <int ROWS, class C, class T>
void thin_grad_input(int64_t N, int64_t begin, int64_t end, const C* g, int64_t g_row, const T* w, int64_t w_row,
                     T* out, int64_t out_row, bool add) {
  constexpr int64_t L = kLanes<C>;
  thin_product<ROWS, C, T>(
      N, begin, end, g, g_row, w, w_row, [=](int64_t from, int64_t to, const C* sums, int64_t width) {
        for (int64_t m = 0; m < ROWS; ++m) {
          T* const to_row = out + m * out_row + from;
          for (int64_t j = 0; j < to - from; j += L) {
            const Vec<C> sum = load(sums + m * width + j);
            store_first(to_row + j, add ? load_first(to_row + j, to - from - j) + sum : sum, to - from - j);
          }
        }
      });
}

// Stores that go to memory past the caches, where the ISA has them: rows of whole vectors of float or double that all begin
// on a vector's boundary. flush_past_cache ends them, before another thread may read.
template <class C, class T>
bool fits_past_cache([[maybe_unused]] const T* to, [[maybe_unused]] int64_t row) {
#if defined(__x86_64__)
  return std::is_same_v<C, T> && row % kLanes<C> == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Vec<C>) == 0;
#else
  return false;
#endif
}
template <class C, class T>
FASTNN_INLINE void store_past_cache(T* to, Vec<C> v) {
#if defined(__x86_64__)
  alignas(64) float parts[sizeof(v) / sizeof(float)];
  std::memcpy(parts, &v, sizeof v);
  float* const at = reinterpret_cast<float*>(to);
  if constexpr (sizeof v == 16)
    _mm_stream_ps(at, _mm_load_ps(parts));
  else
    for (size_t i = 0; i < sizeof v / 4; i += 8) _mm256_stream_ps(at + i, _mm256_load_ps(parts + i));
#else
  store(to, v);
#endif
}
inline void flush_past_cache() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// out[n, k] = Σ over m of g[m, n] x[m][k] for n of [0, N) in [begin, end), k < K, at least a vector.
template <int ROWS, class C, class T>
void thin_grad_weight(int64_t N, int64_t K, int64_t begin, int64_t end, const C* g, int64_t g_row, const C* const* x,
                      T* out) {
  // A large matrix is not read into the cache just to be written over.
  const bool past = N * K * int64_t(sizeof(T)) > (8 << 20) && fits_past_cache<C>(out, K);
  for (int64_t n = begin; n < end; ++n) {
    Vec<C> scale[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) scale[m] = splat<C>(g[m * g_row + n]);
    for_each_vector<C>(0, K, [&](int64_t k) __attribute__((always_inline)) {
      Vec<C> sum = scale[0] * load(x[0] + k);
#pragma GCC unroll 8
      for (int m = 1; m < ROWS; ++m) sum = fma(scale[m], load(x[m] + k), sum);
      past ? store_past_cache<C>(out + n * K + k, sum) : store(out + n * K + k, sum);
    });
  }
  if (past) flush_past_cache();
}

}  // namespace fastnn::cpu::FASTNN_ISA

// Attention of few queries: key and value are read once, as they lie in memory, by all rows that share them.
//
// Scores are dot products along head_dim: LANES keys at a time, one accumulator for each, summed across lanes together.
// The values' weighted sum keeps up to 8 vectors of features in registers while it runs down 16 keys.
// Bound by memory: 4 · (head_dim + value_dim) bytes a key. Also the running softmax that attention.inl uses.
#pragma once

#include "cpu/attention_scores.inl"

namespace fastnn::cpu::FASTNN_ISA {

inline constexpr int64_t kAttentionKeys = 128;  // keys of a block
inline constexpr int64_t kDecodeRows = 8;       // more rows than these pay for packing
inline constexpr int64_t kValueKeys = 16;       // keys whose values are added at a time
inline constexpr int64_t kStateRows = 16;       // most rows of a strip, at least MR and kDecodeRows

// Running maximum of the scores, sum of exponentials and weighted sum of values of each row.
template <class C>
struct AttentionState {
  C *acc, *maximum, *sum;
  int64_t stride;  // of acc
  AttentionState(C* memory, int64_t rows, int64_t stride)
      : acc(memory), maximum(acc + rows * stride), sum(maximum + rows), stride(stride) {}
  // A vector may be read from the last sum on.
  static int64_t size(int64_t rows, int64_t stride) { return (rows * (stride + 2) + kLanes<C> + 15) / 16 * 16; }
  void clear(int64_t rows) const {
    std::fill_n(acc, rows * stride, C(0));
    std::fill_n(maximum, rows, kNegativeInfinity<C>);
    std::fill_n(sum, rows, C(0));
  }
  void merge(const AttentionState& other, int64_t rows, C c) const {
    for (int64_t r = 0; r < rows; ++r) {
      const C top = maximum[r] < other.maximum[r] ? other.maximum[r] : maximum[r];
      const C safe = top == kNegativeInfinity<C> ? C(0) : top;
      const C mine = exp2_nonpositive((maximum[r] - safe) * c),
              theirs = exp2_nonpositive((other.maximum[r] - safe) * c);
      maximum[r] = top;
      sum[r] = sum[r] * mine + other.sum[r] * theirs;
      C* a = acc + r * stride;
      const C* b = other.acc + r * stride;
      for (int64_t n = 0; n < stride; n += kLanes<C>)
        store(a + n, fma(load(b + n), splat<C>(theirs), load(a + n) * mine));
    }
  }
};

template <class C>
FASTNN_INLINE C largest(int64_t padded, const C* score) {
  Vec<C> top = load(score);
  for (int64_t j = kLanes<C>; j < padded; j += kLanes<C>) top = vmax(load(score + j), top);
  return reduce_max<C>(top);
}
// Scores become exponentials below `top`, whose sum is returned. Nothing seen yet, -infinity, is taken for 0: -inf less
// -inf is NaN.
template <class C>
FASTNN_INLINE C exponentials(int64_t padded, C c, C top, C* score) {
  const Exponent<C> exponent(top == kNegativeInfinity<C> ? C(0) : top, c, c);
  Vec<C> total = zero<C>();
  for (int64_t j = 0; j < padded; j += kLanes<C>) {
    const Vec<C> e = vexp2_nonpositive(exponent(load(score + j)));
    store(score + j, e);
    total += e;
  }
  return reduce_add<C>(total);
}
// The rows of a strip, below the new maximum of each; alpha is what the row's older sums shrink by.
template <class C>
inline void softmax_strip(int64_t rows, int64_t padded, int64_t stride, C c, C* score, C* alpha, C* maximum, C* sum) {
  constexpr int L = kLanes<C>;
  alignas(64) C old[kStateRows] = {}, safe[kStateRows] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const C top = largest(padded, score + i * stride);
    old[i] = maximum[i];
    maximum[i] = old[i] < top ? top : old[i];
    safe[i] = maximum[i] == kNegativeInfinity<C> ? C(0) : maximum[i];
  }
  for (int64_t i = 0; i < rows; i += L) store(alpha + i, vexp2_nonpositive((load(old + i) - load(safe + i)) * c));
  for (int64_t i = 0; i < rows; ++i)
    sum[i] = sum[i] * alpha[i] + exponentials(padded, c, maximum[i], score + i * stride);
}
// One row that has no older sums.
template <class C>
__attribute__((noinline)) C softmax_row(int64_t padded, C c, C* score, C& maximum) {
  maximum = largest(padded, score);
  return exponentials(padded, c, maximum, score);
}

// Stores the log of the sums of exponentials of rows [r, r + rows), which lie one after the other, and what they come from.
// Whole vectors of both may be read.
template <class C>
inline void store_sums(const AttentionParams& p, int64_t item, int64_t r, int64_t rows, const C* maximum,
                       const C* sum) {
  const C c = score_factor<C>(p) / kLog2E<C>, unseen = value_of_unseen<C>(p);
  const C unseen_lse = unseen == C(0) ? kNegativeInfinity<C> : unseen;
  const int64_t first = item * p.group * p.query_length + r;
  for (int64_t i = 0; i < rows; i += kLanes<C>) {
    const Vec<C> total = load(sum + i), top = load(maximum + i);
    store_first(static_cast<C*>(p.lse) + first + i,
                total == 0 ? splat<C>(unseen_lse) : fma(top, splat<C>(c), vlog(total)), rows - i);
    if (p.maximum) store_first(static_cast<C*>(p.maximum) + first + i, top, rows - i);
    if (p.sum) store_first(static_cast<C*>(p.sum) + first + i, total, rows - i);
  }
}
template <class C>
inline void drop_strip(const AttentionParams& p, int64_t item, int64_t r, int64_t rows, int64_t k0, int64_t count,
                       C* score) {
  for (int64_t i = 0; i < rows; ++i) {
    C* s = score + i * kAttentionKeys;
    drop<C>(p, row_of(p, item, r + i), k0, count, s, s);
  }
}

// Sums each of LANES vectors across its lanes: lane i of the result is the sum of parts[i · kLanes …].
template <class C, int D = kLanes<C> / 2>
FASTNN_INLINE void add_halves(Vec<C>* r) {
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < D; ++i) {
      swap_halves<C, D>(r[i], r[i + D], std::make_integer_sequence<int, kLanes<C>>{});
      r[i] += r[i + D];
    }
    add_halves<C, D / 2>(r);
  }
}
template <class C>
FASTNN_INLINE Vec<C> reduce_each(const C* parts) {
  Vec<C> r[kLanes<C>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<C>; ++i) r[i] = load(parts + i * kLanes<C>);
  add_halves<C>(r);
  return r[0];
}

// score[i][0 … LANES) = query row i (of ROWS) times keys line[0 … LANES).
template <int ROWS, class T, class C = Compute<T>>
FASTNN_INLINE void decode_scores(const C* query, int64_t query_stride, const T* const* line, int64_t depth, C* score) {
  constexpr int L = kLanes<C>, STEP = ROWS >= 3 ? 2 : L < 8 / ROWS ? L : 8 / ROWS;  // keys whose accumulators fit
  alignas(64) C parts[ROWS][L * L];
  const int64_t whole = depth / L * L;
  for (int j = 0; j < L; j += STEP) {
    Vec<C> acc[ROWS][STEP];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * STEP; ++i) acc[i / STEP][i % STEP] = zero<C>();
    const auto add = [&](int64_t e, const Vec<C>* k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const Vec<C> q = load(query + i * query_stride + e);
#pragma GCC unroll 8
        for (int t = 0; t < STEP; ++t) acc[i][t] = fma(q, k[t], acc[i][t]);
      }
    };
    Vec<C> k[STEP];
    for (int64_t e = 0; e < whole; e += L) {
#pragma GCC unroll 8
      for (int t = 0; t < STEP; ++t) k[t] = load(line[j + t] + e);
      add(e, k);
    }
    if (whole < depth) {
#pragma GCC unroll 8
      for (int t = 0; t < STEP; ++t) k[t] = load_first(line[j + t] + whole, depth - whole);
      add(whole, k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * STEP; ++i) store(parts[i / STEP] + (j + i % STEP) * L, acc[i / STEP][i % STEP]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) store(score + i * kAttentionKeys, reduce_each<C>(parts[i]));
}

// acc[i][0 … columns) = acc · alpha[i] + sum over keys of weight[i][key] · value[key], for ROWS rows.
template <int ROWS, class T, class C = Compute<T>>
FASTNN_INLINE void decode_values(const C* weight, const T* value, int64_t value_stride, int64_t count, int64_t columns,
                                 const C* alpha, C* acc, int64_t acc_stride) {
  constexpr int L = kLanes<C>, WIDE = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;  // vectors of features in registers
  int64_t n = 0;
  for (; n + WIDE * L <= columns; n += WIDE * L) {
    Vec<C> sum[ROWS][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * WIDE; ++i) sum[i / WIDE][i % WIDE] = zero<C>();
    for (int64_t k = 0; k < count; ++k) {
      Vec<C> v[WIDE];
#pragma GCC unroll 8
      for (int t = 0; t < WIDE; ++t) v[t] = load(value + k * value_stride + n + t * L);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const Vec<C> w = splat<C>(weight[i * kAttentionKeys + k]);
#pragma GCC unroll 8
        for (int t = 0; t < WIDE; ++t) sum[i][t] = fma(w, v[t], sum[i][t]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * WIDE; ++i) {
      C* a = acc + i / WIDE * acc_stride + n + i % WIDE * L;
      store(a, fma(load(a), splat<C>(alpha[i / WIDE]), sum[i / WIDE][i % WIDE]));
    }
  }
  for (; n < columns; n += L) {
    Vec<C> sum[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] = zero<C>();
    for (int64_t k = 0; k < count; ++k) {
      const Vec<C> v = load_first(value + k * value_stride + n, columns - n);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sum[i] = fma(splat<C>(weight[i * kAttentionKeys + k]), v, sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      C* a = acc + i * acc_stride + n;
      store(a, fma(load(a), splat<C>(alpha[i]), sum[i]));
    }
  }
}

// Calls f(std::integral_constant<int, ROWS>, first row) for groups of 4 rows and one of the rest.
template <class F>
FASTNN_INLINE void with_few_rows(int64_t rows, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) f(std::integral_constant<int, 4>{}, i);
  if (rows - i == 3) f(std::integral_constant<int, 3>{}, i);
  if (rows - i == 2) f(std::integral_constant<int, 2>{}, i);
  if (rows - i == 1) f(std::integral_constant<int, 1>{}, i);
}

template <class C>
inline int64_t decode_memory(const AttentionParams& p, int64_t rows) {
  return rows * (p.head_dim + kLanes<C> + kAttentionKeys) + 64;
}

template <class C>
inline int64_t few_stride(const AttentionParams& p) {
  return (p.head_dim + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}
// Rows [r0, r0 + rows) of query, few_stride apart, with zeros behind their features.
template <class T, class C = Compute<T>>
inline void pack_few(const AttentionParams& p, int64_t item, int64_t r0, int64_t rows, C* query) {
  for (int64_t r = 0; r < rows; ++r) {
    const Row row = row_of(p, item, r0 + r);
    const T* from = static_cast<const T*>(p.query.data) + p.query.offset[row.head] + row.query * p.query.row_stride;
    for (int64_t e = 0; e < few_stride<C>(p); ++e)
      *query++ = e < p.head_dim ? load_one(from + e * p.query.col_stride) : C(0);
  }
}
// Their products with the keys of the block at k0; those before k_end count.
template <class T, class C = Compute<T>>
FASTNN_INLINE void scores_few(const AttentionParams& p, int64_t item, int64_t rows, int64_t k0, int64_t k_end,
                              const C* query, C* score) {
  constexpr int L = kLanes<C>;
  const T* const key = static_cast<const T*>(p.key.data) + p.key.offset[item];
  for (int64_t j = 0; j < std::min(kAttentionKeys, k_end - k0); j += L) {
    const T* line[L];
    for (int i = 0; i < L; ++i) line[i] = key + std::min(k0 + j + i, k_end - 1) * p.key.row_stride;
    const int64_t ahead = k0 + j + 2 * L;
    if (ahead < k_end)
      prefetch_rows(key + ahead * p.key.row_stride, p.key.row_stride, std::min<int64_t>(L, k_end - ahead), p.head_dim);
    with_few_rows(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      decode_scores<decltype(height)::value, T>(query + i * few_stride<C>(p), few_stride<C>(p), line, p.head_dim,
                                                score + i * kAttentionKeys + j);
    });
  }
}

// All rows of one item against the keys [k_begin, k_end).
template <class T, class C = Compute<T>>
inline void attend_few(const AttentionParams& p, int64_t item, int64_t rows, int64_t k_begin, int64_t k_end, C* memory,
                       const AttentionState<C>& state) {
  constexpr int L = kLanes<C>;
  C* const score = memory;
  C* const query = memory + rows * kAttentionKeys;
  pack_few<T>(p, item, 0, rows, query);
  const T* const value = static_cast<const T*>(p.value.data) + p.value.offset[item];
  const Range seen = visible_keys(p, 0, rows);
  k_end = std::min(k_end, seen.end);
  for (int64_t k0 = std::max(k_begin, seen.begin / kAttentionKeys * kAttentionKeys); k0 < k_end; k0 += kAttentionKeys) {
    const int64_t count = std::min(kAttentionKeys, k_end - k0), padded = (count + L - 1) / L * L;
    scores_few<T>(p, item, rows, k0, k_end, query, score);
    alignas(64) C alpha[kStateRows];
    constexpr C ones[4] = {1, 1, 1, 1};
    for (int64_t i = 0; i < rows; ++i)
      finish_scores<T>(p, row_of(p, item, i), k0, count, padded, score + i * kAttentionKeys);
    softmax_strip(rows, padded, kAttentionKeys, score_factor<C>(p), score, alpha, state.maximum, state.sum);
    if (p.dropout_p > 0) drop_strip(p, item, 0, rows, k0, count, score);
    // Some keys at a time, whole rows of value: they come from memory in the order in which they lie there.
    for (int64_t k = 0; k < count; k += kValueKeys) {
      const int64_t ahead = k0 + k + kValueKeys;
      if (ahead < k_end)
        prefetch_rows(value + ahead * p.value.row_stride, p.value.row_stride, std::min(kValueKeys, k_end - ahead),
                      p.value_dim);
      with_few_rows(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
        decode_values<decltype(height)::value, T>(score + i * kAttentionKeys + k, value + (k0 + k) * p.value.row_stride,
                                                  p.value.row_stride, std::min(kValueKeys, count - k), p.value_dim,
                                                  k == 0 ? alpha + i : ones, state.acc + i * state.stride,
                                                  state.stride);
      });
    }
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA

// weights = dropout(softmax(scores)): what attention multiplies the values by, for callers that want to see it. Or their
// mean over the heads, summed in the order of the heads tile by tile, so that the matrices of the heads never exist.
// The scores are computed again, as attention does it; each row's maximum and sum are attention's own: a weight of 1 is 1.
//
// Tiling: a task is some queries (at most 192) against a block of 128 keys, in one head or, for the mean, in each of its
// heads in turn. The keys are packed once, MR x 128 scores by the GEMM micro-kernel lie in L1, the sums of the mean
// (96 KiB) in L2. No sum runs across tasks: equal on any number of threads.
// Bound by the FMA units, 2 · head_dim flops a score and one exp2; with few features or 16 bits by that exp2 and the store.
#pragma once

#include "cpu/attention.inl"

namespace fastnn::cpu::FASTNN_ISA {

// The weights of queries [q, q + rows) of one head for the `count` keys from k0, packed in `key` or (null) as they lie;
// `query` is room for a strip. Dropped ones are zero, the others not yet scaled up.
template <class T, class C = Compute<T>>
inline void weights_strip(const AttentionParams& p, int64_t head, int64_t q, int64_t rows, int64_t k0, int64_t count,
                          const C* key, C* query, C* weight) {
  constexpr int64_t NR = kNR<C>;
  const int64_t padded = (count + NR - 1) / NR * NR, item = head / p.group;
  const int64_t r = head % p.group * p.query_length + q;
  const bool seen = visible_keys(p, q).begin < k0 + count && visible_keys(p, q + rows - 1).end > k0;
  if (seen && !key) {
    pack_few<T>(p, item, r, rows, query);
    scores_few<T>(p, item, rows, k0, k0 + count, query, weight);
  } else if (seen) {
    Strip<C> strip = strip_in_place<C, T>(p.query, head, q, rows);
    if (!strip.data) {
      pack_strip<C, T>(p, p.query, item, r, rows, p.head_dim, query);
      strip = {query, 0};
    }
    strip_products<C>(strip, key, rows, count, p.head_dim, weight, kAttentionKeys);
  }
  const C c = score_factor<C>(p);
  for (int64_t i = 0; i < rows; ++i) {
    const Row row{head, q + i};
    C* const s = weight + i * kAttentionKeys;
    if (seen) {
      finish_scores<T>(p, row, k0, count, padded, s);
    } else {
      std::fill_n(s, padded, kNegativeInfinity<C>);
    }
    // As softmax_strip has it.
    const int64_t at = head * p.query_length + row.query;
    const C top = static_cast<const C*>(p.maximum)[at], sum = static_cast<const C*>(p.sum)[at];
    const Exponent<C> exponent(top == kNegativeInfinity<C> ? C(0) : top, c, c);
    const Vec<C> inverse = splat<C>(sum == 0 ? value_of_unseen<C>(p) : C(1) / sum);
    for (int64_t j = 0; j < padded; j += kLanes<C>) store(s + j, vexp2_nonpositive(exponent(load(s + j))) * inverse);
    if (p.dropout_p > 0) drop<C>(p, row, k0, count, s, s);
  }
}

// Result `result` (a head, or the mean of some) for the queries [q0, q1) and `count` keys from k0.
template <class T, class C = Compute<T>>
inline void weights_task(const AttentionWeightsParams& w, bool decode, int64_t result, int64_t q0, int64_t q1,
                         int64_t k0, int64_t count, C* memory) {
  constexpr int64_t MR = kMR<C>, L = kLanes<C>;
  const AttentionParams& p = w.forward;
  C* const key = decode ? nullptr : memory + MR * few_stride<C>(p);
  C* const query = memory;
  C* const weight = memory + MR * few_stride<C>(p) + (decode ? 0 : kAttentionKeys * p.head_dim);
  C* const sums = weight + MR * kAttentionKeys;
  const C factor = static_cast<C>(keep_scale(p) / static_cast<double>(w.averaged));
  for (int64_t n = 0; n < w.averaged; ++n) {
    const int64_t head = result * w.averaged + n;
    if (key) pack_positions_as_columns<C, T>(p.key, p.key.offset[head / p.group], k0, count, p.head_dim, key);
    for (int64_t q = q0; q < q1; q += MR) {
      const int64_t rows = std::min(MR, q1 - q);
      weights_strip<T>(p, head, q, rows, k0, count, key, query, weight);
      for (int64_t i = 0; i < rows; ++i) {
        const C* const s = weight + i * kAttentionKeys;
        C* const sum = sums + (q - q0 + i) * kAttentionKeys;
        T* const out = static_cast<T*>(w.weights) + (result * p.query_length + q + i) * p.key_length + k0;
        for (int64_t j = 0; j < count; j += L) {
          const Vec<C> x = n == 0 ? load(s + j) : load(sum + j) + load(s + j);
          if (n + 1 < w.averaged) {
            store(sum + j, x);
          } else {
            store_first(out + j, x * factor, count - j);
          }
        }
      }
    }
  }
}

template <class T>
inline void attention_weights(const AttentionWeightsParams& w) {
  using C = Compute<T>;
  constexpr int64_t MR = kMR<C>;
  const AttentionParams& p = w.forward;
  const int64_t L = p.query_length, S = p.key_length, results = w.averaged > 0 ? p.heads / w.averaged : 0;
  const int64_t k_blocks = (S + kAttentionKeys - 1) / kAttentionKeys;
  int64_t queries = 192 / MR * MR;  // of a task: no result depends on them
  const auto q_blocks = [&] { return (L + queries - 1) / queries; };
  while (queries >= 8 * MR && results * k_blocks * q_blocks() < 4 * p.threads) queries = queries / 2 / MR * MR;

  const bool decode = attention_plan<C>(p).decode;
  const int64_t tasks = results * k_blocks * q_blocks();
  const double flops = 2.0 * p.heads * L * S * (p.head_dim + 16.0), bytes = 1.0 * results * L * S * sizeof(T);
  const int threads = static_cast<int>(std::min<int64_t>(worth_threads(p.threads, flops, bytes), tasks));
  TaskQueue queue(tasks);
  parallel(threads, [&](int, int) {
    Scratch<C> memory(MR * few_stride<C>(p) + (decode ? 0 : kAttentionKeys * p.head_dim) +
                      (MR + (w.averaged > 1 ? queries : 0)) * kAttentionKeys);
    for (int64_t task; queue.take(task);) {
      const int64_t k0 = task % k_blocks * kAttentionKeys, q0 = task / k_blocks % q_blocks() * queries;
      weights_task<T>(w, decode, task / k_blocks / q_blocks(), q0, std::min(q0 + queries, L), k0,
                      std::min(kAttentionKeys, S - k0), memory.data());
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA

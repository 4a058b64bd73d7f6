// Gradients of attention, from the saved log-sum-exp: P = exp(S - lse) is computed again tile by tile.
//   dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ⊙ (dP - delta),  dQ = scale dS K,  dK = scale dSᵀ Q,  delta = rowsum(dO ⊙ O) - dlse
// with dropout on P and dP, and dS times the slope of the soft cap for dQ and dK (Dao et al., arXiv 2205.14135, 2.3).
// dS itself is the gradient of an additive mask, summed over what the mask was broadcast along.
//
// Tiling: a task is one head of keys and a part of its keys (with a mask's gradient, all heads of keys that add to one
// place, in up to kMaskParts groups whose sums are added after). A block of 96 keys is packed once, with its dK and dV it
// stays in L2 while blocks of 96 queries pass. Five products for each pair, all on the GEMM micro-kernel; tiles of P and
// dS are 36 KiB each. Strips compute only the keys that they may see.
// Each task adds to a dQ of its own; they are summed in order. The cut of the keys depends on the shape alone and a
// block's sums run in one order: no atomics, equal on any number of threads.
// Bound by the FMA units: 10 · head_dim flops a score.
#pragma once

#include "cpu/attention.inl"
#include "cpu/attention_kernels.h"
#include "cpu/attention_weights.inl"

namespace fastnn::cpu::FASTNN_ISA {

inline constexpr int64_t kMaskParts = 4;
inline constexpr int64_t kGradKeys = 96;  // a multiple of NR and of dropout's 32
template <class C>
inline constexpr int64_t kGradQueries = 96 / kMR<C> * kMR<C>;

// Working memory of one thread: a block of keys, a block of queries, the tiles between them.
template <class C>
struct GradientBlock {
  static constexpr int64_t MR = kMR<C>, NR = kNR<C>, kTile = kGradQueries<C> * kGradKeys;
  int64_t E, Ev, padded_E, padded_Ev;
  C *key_columns, *key_features, *value_columns;                   // panels of B
  C *query_strips, *query_features, *grad_strips, *grad_features;  // A and B of a block of queries
  C *probability, *grad_score, *slope, *grad_key, *grad_value;

  static int64_t pad(int64_t n) { return (n + NR - 1) / NR * NR; }
  GradientBlock(const AttentionParams& p, C* memory)
      : E(p.head_dim), Ev(p.value_dim), padded_E(pad(E)), padded_Ev(pad(Ev)) {
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + (count + 15) / 16 * 16); };
    key_columns = take(kGradKeys * E), key_features = take(kGradKeys * padded_E), value_columns = take(kGradKeys * Ev);
    query_strips = take(kGradQueries<C> * E), query_features = take(kGradQueries<C> * padded_E);
    grad_strips = take(kGradQueries<C> * Ev), grad_features = take(kGradQueries<C> * padded_Ev);
    probability = take(kTile + MR), grad_score = take(kTile + MR), slope = take(kGradKeys);
    grad_key = take(kGradKeys * padded_E), grad_value = take(kGradKeys * padded_Ev);
  }
  static int64_t size(const AttentionParams& p) {
    return (kGradKeys + kGradQueries<C>)*(2 * pad(p.head_dim) + 2 * pad(p.value_dim)) + kGradKeys * pad(p.head_dim) +
           2 * (kTile + MR) + kGradKeys + 16 * 16;
  }
};

template <class C, int ROWS>
FASTNN_INLINE void add_tile(const Tile<C, ROWS>& tile, int64_t rows, C* acc, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i, acc += stride) {
    if (i >= rows) break;
    store(acc, load(acc) + tile.acc[i][0]);
    store(acc + kLanes<C>, load(acc + kLanes<C>) + tile.acc[i][1]);
  }
}

// One head's queries [q0, q0 + count) as the A of S and dP and, if asked for, the B of dK and dV.
template <class T, class C = Compute<T>>
inline void pack_queries(const AttentionBackwardParams& b, int64_t head, int64_t q0, int64_t count, bool features,
                         const GradientBlock<C>& m) {
  constexpr int64_t MR = kMR<C>;
  const AttentionOperand &q = b.forward.query, &g = b.grad_output;
  const T* query = static_cast<const T*>(q.data) + q.offset[head] + q0 * q.row_stride;
  const T* grad = static_cast<const T*>(g.data) + g.offset[head] + q0 * g.row_stride;
  for (int64_t i = 0; i < count; i += MR) {
    const int64_t rows = std::min(MR, count - i);
    if (!strip_in_place<C, T>(q, head, q0 + i, rows).data)
      pack_panel<MR>(query + i * q.row_stride, q.row_stride, q.col_stride, rows, m.E, m.query_strips + i * m.E);
    if (!strip_in_place<C, T>(g, head, q0 + i, rows).data)
      pack_panel<MR>(grad + i * g.row_stride, g.row_stride, g.col_stride, rows, m.Ev, m.grad_strips + i * m.Ev);
  }
  if (!features) return;
  pack_features_as_columns<C, T>(q, q.offset[head], q0, count, m.E, m.query_features);
  pack_features_as_columns<C, T>(g, g.offset[head], q0, count, m.Ev, m.grad_features);
}

// Adds a row of dS, of `count` keys from k0 on, where the mask that was added to its scores has its gradient.
template <class C>
inline void add_to_mask(const AttentionBackwardParams& b, const Row& row, int64_t k0, int64_t count, const C* from,
                        C* grad_mask) {
  constexpr int64_t L = kLanes<C>;
  C* const to = grad_mask + (b.mask_index[row.head] * b.mask_rows + (b.mask_rows == 1 ? 0 : row.query)) * b.mask_cols;
  if (b.mask_cols != 1) {
    for (int64_t j = 0; j < count; j += L)
      store_first(to + k0 + j, load_first(to + k0 + j, count - j) + load(from + j), count - j);
    return;
  }
  Vec<C> sum = zero<C>();
  for (int64_t j = 0; j < count; j += L) sum += load_first(from + j, count - j);
  *to += reduce_add<C>(sum);
}

// P (after dropout) and dS of the strip of `rows` queries that starts `i` into the block at q0, against all `count`
// keys of the block at k0; zero where a key may not be seen. Returns the keys seen, in steps of NR from the first.
// Before the soft cap's slope, dS is added to grad_mask (null: not wanted), laid out as the whole of b.grad_mask.
template <class T, class C = Compute<T>>
inline Range gradient_strip(const AttentionBackwardParams& b, int64_t head, int64_t q0, int64_t i, int64_t rows,
                            int64_t k0, int64_t count, const C* delta, C* grad_mask, const GradientBlock<C>& m) {
  constexpr int64_t NR = kNR<C>, L = kLanes<C>;
  const AttentionParams& p = b.forward;
  const int64_t q = q0 + i, whole = GradientBlock<C>::pad(count);
  const Range first = visible_keys(p, q), last = visible_keys(p, q + rows - 1);
  const int64_t begin = std::max<int64_t>(first.begin - k0, 0) / NR * NR, end = std::min(last.end - k0, count);
  C *const P = m.probability + i * kGradKeys, *const dS = m.grad_score + i * kGradKeys;
  if (begin >= end) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(P + r * kGradKeys, whole, C(0));
      std::fill_n(dS + r * kGradKeys, whole, C(0));
    }
    return {0, 0};
  }
  const int64_t width = end - begin, padded = (width + NR - 1) / NR * NR;
  Strip<C> query = strip_in_place<C, T>(p.query, head, q, rows),
           grad = strip_in_place<C, T>(b.grad_output, head, q, rows);
  if (!query.data) query = {m.query_strips + i * m.E, 0};
  if (!grad.data) grad = {m.grad_strips + i * m.Ev, 0};
  strip_products<C>(query, m.key_columns + begin * m.E, rows, width, m.E, P + begin, kGradKeys);
  strip_products<C>(grad, m.value_columns + begin * m.Ev, rows, width, m.Ev, dS + begin, kGradKeys);
  const C c = score_factor<C>(p), keep = static_cast<C>(keep_scale(p));
  const bool capped = p.softcap != 0;
  for (int64_t r = 0; r < rows; ++r) {
    C *const s = P + r * kGradKeys, *const d = dS + r * kGradKeys;
    const Row row{head, q + r};
    finish_scores<T>(p, row, k0 + begin, width, padded, s + begin, capped ? m.slope : nullptr);
    const C lse = static_cast<const C*>(p.lse)[head * p.query_length + row.query];
    // A row with no key to see has lse -infinity, and P = 0. Huge ones are masked: there, scores have lse's scale.
    const Exponent<C> exponent(lse == kNegativeInfinity<C> ? -lse : lse, c, kLog2E<C>);
    const Vec<C> less = splat<C>(delta[head * p.query_length + row.query]);
    if (p.dropout_p > 0) drop<C>(p, row, k0 + begin, width, d + begin, d + begin);
    for (int64_t j = begin; j < begin + padded; j += L) {
      const Vec<C> x = vexp2_nonpositive(exponent(load(s + j)));
      store(s + j, x);
      store(d + j, x * fma(load(d + j), splat<C>(keep), -less));
    }
    if (grad_mask) add_to_mask(b, row, k0 + begin, width, d + begin, grad_mask);
    for (int64_t j = begin; capped && j < begin + padded; j += L) store(d + j, load(d + j) * load(m.slope + j - begin));
    if (p.dropout_p > 0) {
      drop<C>(p, row, k0 + begin, width, s + begin, s + begin);
      for (int64_t j = begin; j < begin + padded; j += L) store(s + j, load(s + j) * keep);
    }
    std::fill(s, s + begin, C(0));
    std::fill(d, d + begin, C(0));
    std::fill(s + begin + padded, s + whole, C(0));
    std::fill(d + begin + padded, d + whole, C(0));
  }
  return {begin, end};
}

// One block of keys against one block of queries of one head.
template <class T, class C = Compute<T>>
inline void gradient_pair(const AttentionBackwardParams& b, int64_t head, int64_t q0, int64_t queries, int64_t k0,
                          int64_t count, const C* delta, C* grad_query, C* grad_mask, const GradientBlock<C>& m) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  const AttentionParams& p = b.forward;
  for (int64_t i = 0; i < queries; i += MR) {
    const int64_t rows = std::min(MR, queries - i);
    const Range keys = gradient_strip<T>(b, head, q0, i, rows, k0, count, delta, grad_mask, m);
    if (!grad_query || keys.begin == keys.end) continue;
    for (int64_t n = 0; n < m.E; n += NR)
      with_rows<C>(rows, [&](auto height) {
        Tile<C, decltype(height)::value> tile;
        micro_kernel_strided<C, decltype(height)::value>(keys.end - keys.begin,
                                                         m.grad_score + i * kGradKeys + keys.begin, kGradKeys, 1,
                                                         m.key_features + n * count + keys.begin * NR, tile);
        add_tile(tile, rows, grad_query + (q0 + i) * m.padded_E + n, m.padded_E);
      });
  }
  const auto add_transposed = [&](const C* tile_of, const C* features, int64_t width, C* acc, int64_t stride) {
    for (int64_t j = 0; j < count; j += MR) {
      const int64_t rows = std::min(MR, count - j);
      // Queries that may see any of these keys.
      const int64_t from = std::max<int64_t>(k0 + j - p.last_shift - q0, 0);
      const int64_t to = std::min<int64_t>(k0 + j + rows - p.first_shift - q0, queries);
      for (int64_t n = 0; n < width && from < to; n += NR)
        with_rows<C>(rows, [&](auto height) {
          Tile<C, decltype(height)::value> tile;
          micro_kernel_strided<C, decltype(height)::value>(to - from, tile_of + from * kGradKeys + j, 1, kGradKeys,
                                                           features + n * queries + from * NR, tile);
          add_tile(tile, rows, acc + j * stride + n, stride);
        });
    }
  };
  if (b.grad_value.data) add_transposed(m.probability, m.grad_features, m.Ev, m.grad_value, m.padded_Ev);
  if (b.grad_key.data) add_transposed(m.grad_score, m.query_features, m.E, m.grad_key, m.padded_E);
}

// Stores `count` rows of one head's gradient, times a factor.
template <class T, class C = Compute<T>>
inline void store_gradient(const AttentionResult& to, int64_t head, int64_t row, int64_t count, int64_t width,
                           const C* from, int64_t stride, C factor) {
  for (int64_t i = 0; i < count; ++i) {
    T* out = static_cast<T*>(to.data) + to.offset[head] + (row + i) * to.row_stride;
    for (int64_t n = 0; n < width; n += 64 / int64_t(sizeof(T))) __builtin_prefetch(out + 8 * to.row_stride + n, 1);
    for (int64_t n = 0; n < width; n += kLanes<C>)
      store_first(out + n, load(from + i * stride + n) * factor, width - n);
  }
}

// One part of one item's keys; grad_query (null: not wanted) is this task's own, [group · query_length, padded_E].
template <class T, class C = Compute<T>>
inline void gradient_task(const AttentionBackwardParams& b, int64_t item, int64_t k_begin, int64_t k_end,
                          const C* delta, C* grad_query, C* grad_mask, const GradientBlock<C>& m) {
  const AttentionParams& p = b.forward;
  const int64_t L = p.query_length;
  const C scale = static_cast<C>(p.head_dim == 0 ? 1 : p.scale);
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kGradKeys) {
    const int64_t count = std::min(kGradKeys, k_end - k0);
    pack_positions_as_columns<C, T>(p.key, p.key.offset[item], k0, count, m.E, m.key_columns);
    pack_positions_as_columns<C, T>(p.value, p.value.offset[item], k0, count, m.Ev, m.value_columns);
    if (grad_query) pack_features_as_columns<C, T>(p.key, p.key.offset[item], k0, count, m.E, m.key_features);
    std::fill_n(m.grad_key, count * m.padded_E, C(0));
    std::fill_n(m.grad_value, count * m.padded_Ev, C(0));
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t head = item * p.group + g;
      for (int64_t q0 = 0; q0 < L; q0 += kGradQueries<C>) {
        const int64_t queries = std::min(kGradQueries<C>, L - q0);
        const Range first = visible_keys(p, q0), last = visible_keys(p, q0 + queries - 1);
        if (first.begin >= k0 + count || last.end <= k0) continue;
        pack_queries<T>(b, head, q0, queries, b.grad_key.data || b.grad_value.data, m);
        gradient_pair<T>(b, head, q0, queries, k0, count, delta, grad_query ? grad_query + g * L * m.padded_E : nullptr,
                         grad_mask, m);
      }
    }
    if (b.grad_key.data) store_gradient<T>(b.grad_key, item, k0, count, m.E, m.grad_key, m.padded_E, scale);
    if (b.grad_value.data) store_gradient<T>(b.grad_value, item, k0, count, m.Ev, m.grad_value, m.padded_Ev, C(1));
  }
}

// delta[l] = sum of grad_output ⊙ output over features, less the gradient of lse.
template <class T, class C = Compute<T>>
inline void delta_rows(const AttentionBackwardParams& b, int64_t head, C* delta) {
  const AttentionParams& p = b.forward;
  const AttentionOperand& g = b.grad_output;
  for (int64_t l = 0; l < p.query_length; ++l) {
    const T* out = static_cast<const T*>(p.output.data) + p.output.offset[head] + l * p.output.row_stride;
    const T* grad = static_cast<const T*>(g.data) + g.offset[head] + l * g.row_stride;
    Vec<C> sum = zero<C>();
    int64_t n = 0;
    if (g.col_stride == 1)
      for (; n + kLanes<C> <= p.value_dim; n += kLanes<C>) sum = fma(load(out + n), load(grad + n), sum);
    C total = reduce_add<C>(sum);
    for (; n < p.value_dim; ++n) total += load_one(out + n) * load_one(grad + n * g.col_stride);
    if (b.grad_lse) total -= static_cast<const C*>(b.grad_lse)[head * p.query_length + l];
    delta[l] = total;
  }
}

// Which heads of keys (items) add to one place of a mask's gradient: those of a class, which lie together in `items`. A
// class is cut into `groups`, whose sums lie apart; so do those of the parts of the keys where the mask has one column.
struct MaskPlan {
  Scratch<int64_t> items;
  int64_t count, classes, groups = 1, copies = 1;

  MaskPlan(const AttentionBackwardParams& b, int64_t count, int64_t parts)
      : items(count), count(count), classes(count) {
    for (int64_t i = 0; i < count; ++i) items[i] = i;
    if (!b.grad_mask || count == 0) return;
    // A mask is broadcast along whole dimensions, so items that share one head of it share all of theirs.
    const auto place = [&](int64_t item) { return b.mask_index[item * b.forward.group]; };
    Scratch<int64_t> ends(b.mask_heads + 1);  // where the items of a place begin, then where they end
    std::fill_n(ends.data(), b.mask_heads + 1, int64_t{0});
    for (int64_t i = 0; i < count; ++i) ++ends[place(i) + 1];
    classes = 0;
    for (int64_t h = 0; h < b.mask_heads; ++h) classes += ends[h + 1] > 0, ends[h + 1] += ends[h];
    for (int64_t i = 0; i < count; ++i) items[ends[place(i)]++] = i;
    groups = std::min(count / classes, std::clamp<int64_t>(16 / (classes * parts), 1, kMaskParts));
    copies = groups * (b.mask_cols == 1 ? parts : 1);
  }
  // The items of a group, of classes · groups.
  Range of(int64_t group) const {
    const int64_t each = count / classes, first = group / groups * each;
    const Range r = share(each, 1, static_cast<int>(group % groups), static_cast<int>(groups));
    return {first + r.begin, first + r.end};
  }
};

template <class T>
inline void attention_backward(const AttentionBackwardParams& b) {
  using C = Compute<T>;
  const AttentionParams& p = b.forward;
  const int64_t items = p.group > 0 ? p.heads / p.group : 0, L = p.query_length, S = p.key_length;
  const int64_t padded_E = GradientBlock<C>::pad(p.head_dim), rows = p.group * L;
  const int64_t blocks = (S + kGradKeys - 1) / kGradKeys;
  // Parts of the keys: about 32 tasks in all, of 2 blocks or more; each part costs a dQ of its own.
  const int64_t parts = std::clamp<int64_t>(items > 0 ? 32 / items : 1, 1, std::clamp<int64_t>(blocks / 2, 1, 8));
  const int64_t part_keys = (blocks + parts - 1) / parts * kGradKeys;
  const bool wants_query = b.grad_query.data;
  const MaskPlan mask(b, items, parts);
  const int64_t mask_size = b.grad_mask ? b.mask_heads * b.mask_rows * b.mask_cols : 0;
  C* const grad_mask = static_cast<C*>(b.grad_mask);

  Scratch<C> delta(p.heads * L), grad_query(wants_query ? items * parts * rows * padded_E : 0);
  Scratch<C> mask_copies(mask.copies > 1 ? mask.copies * mask_size : 0);
  C* const mask_sums = mask.copies > 1 ? mask_copies.data() : grad_mask;
  const double flops = 2.0 * p.heads * L * S * (3.0 * p.head_dim + 2.0 * p.value_dim + 16.0);
  const int threads = worth_threads(p.threads, flops, 0);

  const auto over = [&](int64_t tasks, const auto& f) {
    TaskQueue queue(tasks);
    parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
      for (int64_t task; queue.take(task);) f(task);
    });
  };
  over(p.heads, [&](int64_t head) { delta_rows<T>(b, head, delta + head * L); });
  over(mask_size > 0 ? mask.copies : 0,
       [&](int64_t copy) { std::fill_n(mask_sums + copy * mask_size, mask_size, C(0)); });
  const int64_t tasks = items > 0 ? mask.classes * mask.groups * parts : 0;
  TaskQueue queue(tasks);
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    Scratch<C> memory(GradientBlock<C>::size(p));
    const GradientBlock<C> block(p, memory);
    for (int64_t task; queue.take(task);) {
      const int64_t part = task % parts, k0 = part * part_keys, group = task / parts % mask.groups;
      const int64_t copy = b.mask_cols == 1 ? group * parts + part : group;
      const Range own = mask.of(task / parts);
      for (int64_t i = own.begin; i < own.end; ++i) {
        C* const query = wants_query ? grad_query + (mask.items[i] * parts + part) * rows * padded_E : nullptr;
        if (query) std::fill_n(query, rows * padded_E, C(0));
        gradient_task<T>(b, mask.items[i], k0, std::min(k0 + part_keys, S), delta.data(), query,
                         grad_mask ? mask_sums + copy * mask_size : nullptr, block);
      }
    }
  });
  if (mask.copies > 1) {
    parallel(worth_threads(p.threads, 0, 4.0 * mask.copies * mask_size), [&](int thread, int running) {
      const Range r = share(mask_size, 1024, thread, running);
      for (int64_t i = r.begin; i < r.end; ++i) {
        C sum = mask_sums[i];
        for (int64_t copy = 1; copy < mask.copies; ++copy) sum += mask_sums[copy * mask_size + i];
        grad_mask[i] = sum;
      }
    });
  }
  if (!wants_query) return;
  const C scale = static_cast<C>(p.head_dim == 0 ? 1 : p.scale);
  over(p.heads, [&](int64_t head) {
    C* const first = grad_query + (head / p.group * parts * p.group + head % p.group) * L * padded_E;
    for (int64_t part = 1; part < parts; ++part) {
      const C* const other = first + part * rows * padded_E;
      for (int64_t i = 0; i < L * padded_E; i += kLanes<C>) store(first + i, load(first + i) + load(other + i));
    }
    store_gradient<T>(b.grad_query, head, 0, L, p.head_dim, first, padded_E, scale);
  });
}

// ---- table ---------------------------------------------------------------------------------------------------------

template <class F>
FASTNN_INLINE void with_attention_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32: return f(float{});
    case DType::Float64: return f(double{});
    case DType::BFloat16: return f(BFloat16{});
    case DType::Float16: return f(Float16{});
  }
}
inline void attention_forward_isa(const AttentionParams& p) {
  with_attention_dtype(p.dtype, [&](auto t) { attention_forward<decltype(t)>(p); });
}
inline void attention_weights_isa(const AttentionWeightsParams& w) {
  with_attention_dtype(w.forward.dtype, [&](auto t) { attention_weights<decltype(t)>(w); });
}
inline void attention_backward_isa(const AttentionBackwardParams& b) {
  with_attention_dtype(b.forward.dtype, [&](auto t) { attention_backward<decltype(t)>(b); });
}
inline constexpr AttentionKernels attention_kernels = {attention_forward_isa, attention_weights_isa,
                                                       attention_backward_isa};

}  // namespace fastnn::cpu::FASTNN_ISA

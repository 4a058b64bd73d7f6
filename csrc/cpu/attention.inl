// output = softmax(scale · query · keyᵀ + mask) · value by tiles, with the running maximum and sum of
// "FlashAttention" (Dao et al., arXiv 2205.14135); the score matrix never exists as a whole.
//
// Tiling: a task is some hundred rows (queries; those of all heads of a group count as rows of one key) against the keys.
// A block of 128 keys is packed once, keys as columns and values by features, and stays in L2 while the strips of MR
// rows pass over it: MR x 128 scores by the GEMM micro-kernel into L1, softmax on them, times the values at once.
// Strips compute only the columns (in steps of NR) that one of their rows may see, so causal costs half.
// Few rows (decode) go to attention_decode.inl: no packing, key and value are read once; one block of keys to
// attention_short.inl.
//
// Few rows and many keys: keys are cut into parts of 512, whatever the number of threads, and the parts merged by their
// maxima and sums. A row's result depends on its own inputs and on that cut alone: equal on any number of threads.
// Bound by the FMA units: per score 2 · head_dim flops twice and one exp2 (about a cycle on AVX2). On one core of Zen 3
// 73 to 77 of 104 GFLOP/s at 128 to 512 keys of 64, 80 at 1024 of 128: the two products run at nine tenths of the peak, the
// softmax takes a tenth of the time, packing and storing 7 %. Several strips against a panel at a time, panels prefetched into
// L1, and queries packed or in place made no difference; the products do not wait for L2.
#pragma once

#include "cpu/attention_decode.inl"
#include "cpu/attention_scores.inl"
#include "cpu/attention_short.inl"

namespace fastnn::cpu::FASTNN_ISA {

// How the work is cut; a function of the shape, except the rows of a task, which no result depends on.
struct AttentionPlan {
  int64_t items, rows;        // keys' heads, rows of each
  int64_t task_rows, chunks;  // rows of a task, tasks along the rows
  int64_t part_keys, parts;   // keys of a task, tasks along the keys
  bool decode, one_block;
};
template <class C>
inline AttentionPlan attention_plan(const AttentionParams& p) {
  constexpr int64_t MR = kMR<C>, kPart = 512;
  // The more rows, the fewer times that keys are packed; they and their sums pass through L2 once a block.
  const int64_t most_rows = std::max<int64_t>(524288 / ((p.head_dim + p.value_dim + 16) * sizeof(C)), 96) / MR * MR;
  AttentionPlan s;
  s.items = p.group > 0 ? p.heads / p.group : 0;
  s.rows = p.group * p.query_length;
  s.decode = s.rows <= kDecodeRows && p.key.col_stride == 1 && p.value.col_stride == 1;
  s.one_block = !s.decode && p.key_length <= kAttentionKeys;
  const bool split = s.rows <= 64 && s.items <= 64 && p.key_length >= 2 * kPart;
  s.part_keys = split ? kPart : std::max<int64_t>(p.key_length, 1);
  s.parts = split ? (p.key_length + kPart - 1) / kPart : 1;
  const int64_t wanted = 4 * p.threads;  // tasks, so that threads end at about the same time
  int64_t chunks = (s.rows + most_rows - 1) / most_rows;
  if (p.threads > 1 && s.items * s.parts * chunks < wanted && s.items * s.parts > 0)
    chunks = std::min((wanted + s.items * s.parts - 1) / (s.items * s.parts), std::max<int64_t>(s.rows / 48, chunks));
  chunks = std::max<int64_t>(chunks, 1);
  s.task_rows = s.decode ? s.rows : ((s.rows + chunks - 1) / chunks + MR - 1) / MR * MR;
  s.chunks = s.task_rows > 0 ? (s.rows + s.task_rows - 1) / s.task_rows : 0;
  return s;
}

// Rows [r, r + rows) of query in place, or null where they are packed: where many keys follow (1.02 to 1.04 of the speed at
// 1024 and 1500 keys; 0.97 to 0.99 at 64 to 200).
template <class T, class C = Compute<T>>
inline Strip<C> query_in_place(const AttentionParams& p, int64_t item, int64_t r, int64_t rows) {
  const Row first = row_of(p, item, r), last = row_of(p, item, r + rows - 1);
  if (first.head != last.head || p.key_length >= 512) return {nullptr, 0};
  return strip_in_place<C, T>(p.query, first.head, first.query, rows);
}

// The rows of one task against one block of packed keys, strip by strip.
template <class T, class C = Compute<T>>
inline void attend_block(const AttentionParams& p, int64_t item, int64_t r0, int64_t r1, int64_t k0, int64_t count,
                         const C* query, const C* key, const C* value, C* score, const AttentionState<C>& state) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  const C c = score_factor<C>(p);
  for (int64_t r = r0; r < r1; r += MR) {
    const int64_t rows = std::min(MR, r1 - r);
    const Range seen = visible_keys(p, r, r + rows);
    const int64_t begin = std::max<int64_t>(seen.begin - k0, 0) / NR * NR, end = std::min(seen.end - k0, count);
    if (begin >= end) continue;
    const int64_t width = end - begin, padded = (width + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
    Strip<C> strip = query_in_place<T>(p, item, r, rows);
    if (!strip.data) strip = {query + (r - r0) * p.head_dim, 0};
    strip_products<C>(strip, key + begin * p.head_dim, rows, width, p.head_dim, score, kAttentionKeys);
    alignas(64) C alpha[kStateRows];
    for (int64_t i = 0; i < rows; ++i)
      finish_scores<T>(p, row_of(p, item, r + i), k0 + begin, width, padded, score + i * kAttentionKeys);
    softmax_strip(rows, padded, kAttentionKeys, c, score, alpha, state.maximum + (r - r0), state.sum + (r - r0));
    if (p.dropout_p > 0) drop_strip(p, item, r, rows, k0 + begin, width, score);
    for (int64_t n = 0; n < p.value_dim; n += NR) {
      with_rows<C>(rows, [&](auto height) {
        constexpr int ROWS = decltype(height)::value;
        Tile<C, ROWS> tile;
        micro_kernel_strided<C, ROWS>(width, score, kAttentionKeys, 1, value + n * count + begin * NR, tile);
        C* acc = state.acc + (r - r0) * state.stride + n;
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i, acc += state.stride) {
          if (i >= rows) break;
          store(acc, fma(load(acc), splat<C>(alpha[i]), tile.acc[i][0]));
          store(acc + kLanes<C>, fma(load(acc + kLanes<C>), splat<C>(alpha[i]), tile.acc[i][1]));
        }
      });
    }
  }
}

template <class T, class C = Compute<T>>
inline void attend(const AttentionParams& p, int64_t item, int64_t r0, int64_t r1, int64_t k_begin, int64_t k_end,
                   C* memory, const AttentionState<C>& state) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  const int64_t padded_rows = (r1 - r0 + MR - 1) / MR * MR;
  C* const query = memory;
  C* const key = query + padded_rows * p.head_dim;
  C* const value = key + kAttentionKeys * p.head_dim;
  C* const score = value + kAttentionKeys * ((p.value_dim + NR - 1) / NR * NR);
  const Range seen = visible_keys(p, r0, r1);
  k_end = std::min(k_end, seen.end);
  // Blocks start at multiples of their size, so a row meets the same blocks in any task.
  for (int64_t k0 = std::max(k_begin, seen.begin / kAttentionKeys * kAttentionKeys); k0 < k_end; k0 += kAttentionKeys) {
    const int64_t count = std::min(kAttentionKeys, k_end - k0);
    for (int64_t r = r0; r < r1 && k0 <= std::max(k_begin, seen.begin); r += MR) {  // once
      const int64_t rows = std::min(MR, r1 - r);
      if (!query_in_place<T>(p, item, r, rows).data)
        pack_strip<C, T>(p, p.query, item, r, rows, p.head_dim, query + (r - r0) * p.head_dim);
    }
    pack_positions_as_columns<C, T>(p.key, p.key.offset[item], k0, count, p.head_dim, key);
    pack_features_as_columns<C, T>(p.value, p.value.offset[item], k0, count, p.value_dim, value);
    attend_block<T>(p, item, r0, r1, k0, count, query, key, value, score, state);
  }
}

// Divides by the sums and stores rows [r0, r1).
template <class T, class C = Compute<T>>
inline void store_rows(const AttentionParams& p, int64_t item, int64_t r0, int64_t r1, const AttentionState<C>& state) {
  const C keep = static_cast<C>(keep_scale(p)), unseen = value_of_unseen<C>(p);
  for (int64_t r = r0; r < r1; ++r) {
    const Row row = row_of(p, item, r);
    const C sum = state.sum[r - r0];
    const C inverse = sum == 0 ? unseen : keep / sum;
    const C* acc = state.acc + (r - r0) * state.stride;
    T* out = static_cast<T*>(p.output.data) + p.output.offset[row.head] + row.query * p.output.row_stride;
    for (int64_t n = 0; n < p.value_dim; n += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(out + 4 * p.output.row_stride + n, 1);
    for (int64_t n = 0; n < p.value_dim; n += kLanes<C>) store_first(out + n, load(acc + n) * inverse, p.value_dim - n);
  }
  store_sums(p, item, r0, r1 - r0, state.maximum, state.sum);
}

template <class T>
inline void attention_forward(const AttentionParams& p) {
  using C = Compute<T>;
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  const AttentionPlan plan = attention_plan<C>(p);
  const int64_t stride = (p.value_dim + NR - 1) / NR * NR;
  const int64_t state_size = AttentionState<C>::size(plan.task_rows, stride);
  const int64_t memory_size = plan.decode ? decode_memory<C>(p, plan.rows)
                              : plan.one_block
                                  ? short_memory<C>(p, plan.task_rows)
                                  : (plan.task_rows + kAttentionKeys) * p.head_dim + kAttentionKeys * (stride + MR);
  const int64_t results = plan.parts > 1 ? plan.items * plan.parts * plan.chunks : 0;
  Scratch<C> partial(results * state_size);

  const int64_t tasks = plan.items * plan.chunks * plan.parts;
  const double flops = 2.0 * p.heads * p.query_length * p.key_length * (p.head_dim + p.value_dim + 16.0);
  const double bytes = 1.0 * plan.items * p.key_length * (p.head_dim + p.value_dim) * sizeof(T);
  const int threads = static_cast<int>(std::min<int64_t>(worth_threads(p.threads, flops, bytes), tasks));
  TaskQueue queue(tasks);
  parallel(threads, [&](int, int) {
    Scratch<C> memory(memory_size + (plan.one_block ? 0 : state_size));
    for (int64_t task; queue.take(task);) {
      // Later rows first: with a causal limit they take longest.
      const int64_t part = task % plan.parts, item = task / plan.parts % plan.items;
      const int64_t chunk = plan.chunks - 1 - task / plan.parts / plan.items;
      const int64_t r0 = chunk * plan.task_rows, r1 = std::min(r0 + plan.task_rows, plan.rows);
      const int64_t k0 = part * plan.part_keys, k1 = std::min(k0 + plan.part_keys, p.key_length);
      if (plan.one_block) {
        attend_short<T>(p, item, r0, r1, memory.data());
        continue;
      }
      C* const at = plan.parts > 1 ? partial + ((chunk * plan.items + item) * plan.parts + part) * state_size
                                   : memory + memory_size;
      const AttentionState<C> state(at, plan.task_rows, stride);
      state.clear(r1 - r0);
      if (plan.decode) {
        attend_few<T>(p, item, r1, k0, k1, memory.data(), state);
      } else {
        attend<T>(p, item, r0, r1, k0, k1, memory.data(), state);
      }
      if (plan.parts == 1) store_rows<T>(p, item, r0, r1, state);
    }
  });
  if (plan.parts == 1) return;
  for (int64_t result = 0; result < plan.chunks * plan.items; ++result) {
    const int64_t item = result % plan.items, r0 = result / plan.items * plan.task_rows;
    const int64_t r1 = std::min(r0 + plan.task_rows, plan.rows);
    C* const first = partial + result * plan.parts * state_size;
    const AttentionState<C> into(first, plan.task_rows, stride);
    for (int64_t part = 1; part < plan.parts; ++part)
      into.merge({first + part * state_size, plan.task_rows, stride}, r1 - r0, score_factor<C>(p));
    store_rows<T>(p, item, r0, r1, into);
  }
}

}  // namespace fastnn::cpu::FASTNN_ISA

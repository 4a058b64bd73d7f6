// Attention to few keys, one block of them: windows of images, sentences. Each strip of rows goes from its scores to the
// output, with no running maximum, and no sums kept between blocks; bits are those of attention.inl's blocks.
// Bound by what an item of some thousand products costs beside them: packing, exponentials, rows that come from the cache.
#pragma once

#include "cpu/attention_decode.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class C>
inline int64_t short_memory(const AttentionParams& p, int64_t rows) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  return (kAttentionKeys + MR) * p.head_dim + kAttentionKeys * ((p.value_dim + NR - 1) / NR * NR + MR) +
         2 * (rows + kLanes<C>);
}

// out[i] = inverse[i] · weights of row i times `count` values, whose panels of features lie `panel` elements apart.
template <class T, class C = Compute<T>>
__attribute__((noinline)) void store_values(const C* weight, const C* value, int64_t rows, int64_t count, int64_t panel,
                                            int64_t columns, const C* inverse, T* const* out) {
  constexpr int64_t NR = kNR<C>, L = kLanes<C>;
  with_rows<C>(rows, [&](auto height) __attribute__((always_inline)) {
    constexpr int ROWS = decltype(height)::value;
    for (int64_t n = 0; n < columns; n += NR, value += panel) {
      Tile<C, ROWS> tile;
      micro_kernel_strided<C, ROWS>(count, weight, kAttentionKeys, 1, value, tile);
      const int64_t left = columns - n;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        if (i >= rows) break;
        store_first(out[i] + n, tile.acc[i][0] * inverse[i], left);
        if (left > L) store_first(out[i] + n + L, tile.acc[i][1] * inverse[i], left - L);
      }
    }
  });
}

// Rows [r0, r1) of one item; key_length is at most kAttentionKeys.
template <class T, class C = Compute<T>>
inline void attend_short(const AttentionParams& p, int64_t item, int64_t r0, int64_t r1, C* memory) {
  constexpr int64_t MR = kMR<C>, NR = kNR<C>, L = kLanes<C>;
  const int64_t count = visible_keys(p, r0, r1).end;
  C* const query = memory;
  C* const key = query + MR * p.head_dim;
  C* const value = key + kAttentionKeys * p.head_dim;
  C* const score = value + kAttentionKeys * ((p.value_dim + NR - 1) / NR * NR);
  C* const maximum = score + kAttentionKeys * MR;
  C* const sum = maximum + r1 - r0 + L;
  pack_positions_as_columns<C, T>(p.key, p.key.offset[item], 0, count, p.head_dim, key);
  pack_features_as_columns<C, T>(p.value, p.value.offset[item], 0, count, p.value_dim, value);
  const C keep = static_cast<C>(keep_scale(p)), unseen = value_of_unseen<C>(p), factor = score_factor<C>(p);
  const RowTiles<C> tiles(r1 - r0);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t r = r0 + tiles.begin(tile), rows = tiles.begin(tile + 1) - tiles.begin(tile);
    const Range seen = visible_keys(p, r, r + rows);
    const int64_t begin = seen.begin / NR * NR, width = std::max<int64_t>(seen.end - begin, 0);
    const int64_t padded = (width + L - 1) / L * L;
    Row row[MR];
    T* out[MR];
    row[0] = row_of(p, item, r);
    for (int64_t i = 1; i < rows; ++i) {
      row[i] = {row[i - 1].head, row[i - 1].query + 1};
      if (row[i].query == p.query_length) row[i] = {row[i].head + 1, 0};
    }
    Strip<C> strip = {nullptr, 0};
    if (row[0].head == row[rows - 1].head) strip = strip_in_place<C, T>(p.query, row[0].head, row[0].query, rows);
    if (!strip.data) {
      pack_strip<C, T>(p, p.query, item, r, rows, p.head_dim, query);
      strip = {query, 0};
    }
    // The rows of the next strip, and where this one's go: they lie far apart, in the last cache at best.
    if (tile + 1 < tiles.count && strip.row_stride) {
      const Row next = row_of(p, item, r0 + tiles.begin(tile + 1));
      prefetch_rows(static_cast<const T*>(p.query.data) + p.query.offset[next.head] + next.query * p.query.row_stride,
                    p.query.row_stride, std::min(MR, p.query_length - next.query), p.head_dim);
    }
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = static_cast<T*>(p.output.data) + p.output.offset[row[i].head] + row[i].query * p.output.row_stride;
      for (int64_t n = 0; n < p.value_dim; n += 64 / int64_t(sizeof(T))) __builtin_prefetch(out[i] + n, 1);
    }
    if (width > 0) strip_products<C>(strip, key + begin * p.head_dim, rows, width, p.head_dim, score, kAttentionKeys);
    C inverse[MR];
    for (int64_t i = 0; i < rows; ++i) {
      C &top = maximum[r - r0 + i], &total = sum[r - r0 + i];
      top = kNegativeInfinity<C>, total = C(0);
      if (width > 0) {
        C* const scores = score + i * kAttentionKeys;
        finish_scores<T>(p, row[i], begin, width, padded, scores);
        total = softmax_row(padded, factor, scores, top);
      }
      inverse[i] = total == 0 ? unseen : keep / total;
    }
    if (p.dropout_p > 0) drop_strip(p, item, r, rows, begin, width, score);
    store_values<T>(score, value + begin * NR, rows, width, count * NR, p.value_dim, inverse, out);
  }
  store_sums(p, item, r0, r1 - r0, maximum, sum);
}

}  // namespace fastnn::cpu::FASTNN_ISA

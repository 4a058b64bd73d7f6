// What every attention kernel shares: where heads start, which keys a query may see, what becomes of a score, and how
// partial results are merged.
//
// Scores leave here as s with a factor c, so that softmax takes 2^(c·s - c·max): scale and log2(e) cost nothing where
// there is no mask. Rows of a tile are the queries of `heads_of_item` heads that share key and value, head after head.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cmath>

#include "cuda/activation.cuh"
#include "cuda/storage.cuh"
#include "fastnn/attention.h"

namespace fastnn::cuda {

template <class C>
inline constexpr C kLog2E = C(1.44269504088896340735992468100189214);
template <class C>
inline constexpr C kMinusInfinity = -C(INFINITY);

// Offsets of heads as digits times strides, the fastest digit first: kernels take them by value, so that nothing is
// uploaded and a captured graph holds them.
inline constexpr int kHeadDigits = 6;
struct HeadOffsets {
  int64_t first, stride[kHeadDigits];
  uint32_t size[kHeadDigits];
  int digits;

  FASTNN_HOST_DEVICE int64_t operator()(uint32_t head) const {
    int64_t at = first;
#pragma unroll 1
    for (int i = 0; i < digits; ++i) {
      at += head % size[i] * stride[i];
      head /= size[i];
    }
    return at;
  }
};

struct AttentionRows {
  const void* data;
  HeadOffsets heads;
  int64_t row_stride, col_stride;
  int width;  // bytes of the widest copy that every row allows: 16, 8, 4 or 2; mask: two neighbours at once, or one
};

struct AttentionForward {
  AttentionRows query, key, value, mask, output;
  AttentionMask mask_type;
  int query_length, key_length, head_dim, value_dim;
  int heads_of_item, group, rows, row_tiles;  // rows: of an item
  int first_shift, last_shift;                // cut to the lengths
  int first_tile, tiles_per_split;
  double factor, scale, softcap;  // score = softcap · tanh(product · scale) + mask, or product · scale + mask
  double keep, unseen;            // 1 / (1 - dropout_p), and what stands in for it where no key was seen
  uint32_t drop_below;            // 0: no dropout
  uint64_t philox_seed;
  const uint64_t* philox_seed_at;  // or null
  void *lse, *maximum, *sum;
  void* partial;  // or null: [splits, rows of all] values, then as many largest scores, then sums
  int64_t rows_of_all;
};

// One row of a tile; those past the last stand for the last and are not stored.
struct AttentionRow {
  uint32_t head;
  int query;
  FASTNN_DEVICE int64_t number(const AttentionForward& p) const { return int64_t{head} * p.query_length + query; }
};
FASTNN_DEVICE AttentionRow attention_row(const AttentionForward& p, uint32_t item, int row) {
  const int r = row < p.rows ? row : p.rows - 1, head = r / p.query_length;
  return {item * p.heads_of_item + head, r - head * p.query_length};
}

// Keys that any of the rows [r0, r1) may see, and those that all of them may see. Limits grow with the query, so the
// ends of each head's run are enough.
struct KeyRange {
  int begin, end, all_begin, all_end;
};
FASTNN_HOST_DEVICE int cut(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
FASTNN_DEVICE KeyRange visible_keys(const AttentionForward& p, int r0, int r1) {
  if (r0 >= p.rows) return {0, 0, 0, 0};
  if (r1 > p.rows) r1 = p.rows;
  const bool wraps = r0 / p.query_length != (r1 - 1) / p.query_length;
  const int first = wraps ? 0 : r0 % p.query_length, last = wraps ? p.query_length - 1 : (r1 - 1) % p.query_length;
  return {cut(first + p.first_shift, 0, p.key_length), cut(last + p.last_shift + 1, 0, p.key_length),
          cut(last + p.first_shift, 0, p.key_length), cut(first + p.last_shift + 1, 0, p.key_length)};
}
// Tiles of `keys` keys for this block: its rows' range within the split's share.
struct TileRange {
  int begin, end;
};
FASTNN_DEVICE TileRange visible_tiles(const AttentionForward& p, const KeyRange& seen, int keys) {
  if (seen.begin >= seen.end) return {0, 0};
  const int own = p.first_tile + static_cast<int>(blockIdx.y) * p.tiles_per_split;
  const int begin = seen.begin / keys, end = (seen.end + keys - 1) / keys;
  return {begin < own ? own : begin, end < own + p.tiles_per_split ? end : own + p.tiles_per_split};
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// Where the mask of a row starts, in bytes: its elements are of 1, 2, 4 or 8.
template <class T>
FASTNN_DEVICE const unsigned char* mask_row(const AttentionForward& p, const AttentionRow& row) {
  if (p.mask_type == AttentionMask::None) return nullptr;
  const int64_t at = p.mask.heads(row.head) + row.query * p.mask.row_stride;
  const int64_t size = p.mask_type == AttentionMask::Bool      ? 1
                       : p.mask_type == AttentionMask::Float32 ? 4
                                                               : static_cast<int64_t>(sizeof(T));
  return static_cast<const unsigned char*>(p.mask.data) + at * size;
}
template <class C>
FASTNN_DEVICE C masked(C score, uint8_t allowed) {
  return allowed ? score : kMinusInfinity<C>;
}
template <class C, class M>
FASTNN_DEVICE C masked(C score, M added) {
  return score + static_cast<C>(widen(added));
}

// ---- dropout --------------------------------------------------------------------------------------------------------

FASTNN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
// Words of the keys s, s + 8, s + 16 and s + 24, where s / 8 is a multiple of 4.
FASTNN_DEVICE Vector<uint32_t, 4> philox(uint64_t seed, const AttentionRow& row, int s) {
  uint32_t x0 = static_cast<uint32_t>(s / 32 * 8 + s % 8), x1 = static_cast<uint32_t>(row.query), x2 = row.head, x3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, x0), low0 = 0xD2511F53u * x0;
    const uint32_t high2 = multiply_high(0xCD9E8D57u, x2), low2 = 0xCD9E8D57u * x2;
    x0 = high2 ^ x1 ^ key0, x1 = low2;
    x2 = high0 ^ x3 ^ key1, x3 = low0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}
FASTNN_DEVICE uint64_t philox_seed(const AttentionForward& p) {
  return p.drop_below && p.philox_seed_at ? *p.philox_seed_at : p.philox_seed;
}

// ---- sums -----------------------------------------------------------------------------------------------------------

FASTNN_DEVICE float log_of(float x) { return ::logf(x); }
FASTNN_DEVICE double log_of(double x) { return ::log(x); }
FASTNN_DEVICE float exp2_of(float x) { return ::exp2f(x); }
FASTNN_DEVICE double exp2_of(double x) { return ::exp2(x); }

// Nothing seen yet, -infinity, is taken for 0: -infinity less -infinity is NaN. Where there may be a mask the top is taken
// off a score before the factor: in a row masked wholly by the least finite number both are such that times the factor
// they are infinite, or rounded by more than a score.
template <class C>
FASTNN_DEVICE C safe_top(C top) {
  return top == kMinusInfinity<C> ? C(0) : top;
}
FASTNN_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }  // of a number and NaN, the number
FASTNN_DEVICE double larger(double a, double b) { return ::fmax(a, b); }

// What weighted values are multiplied by at the end.
template <class C>
FASTNN_DEVICE C inverse_of(const AttentionForward& p, C sum) {
  return sum == C(0) ? static_cast<C>(p.unseen) : static_cast<C>(p.keep) / sum;
}
template <class C>
FASTNN_DEVICE void store_sums(const AttentionForward& p, int64_t row, C top, C sum) {
  const C unseen = static_cast<C>(p.unseen) == C(0) ? kMinusInfinity<C> : static_cast<C>(p.unseen);
  const C slope = static_cast<C>(p.factor) / kLog2E<C>;
  if (p.lse) static_cast<C*>(p.lse)[row] = sum == C(0) ? unseen : top * slope + log_of(sum);
  if (p.maximum) static_cast<C*>(p.maximum)[row] = top;
  if (p.sum) static_cast<C*>(p.sum)[row] = sum;
}
template <class T>
FASTNN_DEVICE T* output_row(const AttentionForward& p, const AttentionRow& row) {
  return static_cast<T*>(const_cast<void*>(p.output.data)) + p.output.heads(row.head) + row.query * p.output.row_stride;
}

// Where split `split` leaves what it has of a row.
template <class C>
FASTNN_DEVICE C* partial_values(const AttentionForward& p, int split, int64_t row) {
  return static_cast<C*>(p.partial) + (split * p.rows_of_all + row) * p.value_dim;
}
template <class C>
FASTNN_DEVICE C* partial_tops(const AttentionForward& p, int splits, int split, int64_t row) {
  return static_cast<C*>(p.partial) + splits * p.rows_of_all * p.value_dim + split * p.rows_of_all + row;
}
template <class C>
FASTNN_DEVICE void store_partial_sums(const AttentionForward& p, int64_t row, C top, C sum) {
  const int splits = static_cast<int>(gridDim.y), split = static_cast<int>(blockIdx.y);
  C* const at = partial_tops<C>(p, splits, split, row);
  *at = top, at[splits * p.rows_of_all] = sum;
}

// output = Σ values · 2^(c · (top - largest top)) over Σ sums · the same, the splits in their order. One warp, one row.
template <class T>
__global__ void __launch_bounds__(128, 1)
    attention_merge_kernel(__grid_constant__ const AttentionForward p, int splits) {
  using C = Compute<T>;
  const int64_t number = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (number >= p.rows_of_all) return;
  const C* const tops = partial_tops<C>(p, splits, 0, number);
  const C* const sums = tops + splits * p.rows_of_all;
  const C c = static_cast<C>(p.factor);
  C top = kMinusInfinity<C>, sum = C(0);
  for (int s = 0; s < splits; ++s) top = larger(top, tops[s * p.rows_of_all]);
  const C safe = safe_top(top);
  for (int s = 0; s < splits; ++s) sum += sums[s * p.rows_of_all] * exp2_of((tops[s * p.rows_of_all] - safe) * c);
  const C inverse = inverse_of(p, sum);
  const AttentionRow row = {static_cast<uint32_t>(number / p.query_length), static_cast<int>(number % p.query_length)};
  T* const out = output_row<T>(p, row);
  for (int n = lane; n < p.value_dim; n += 32) {
    C value = C(0);
    for (int s = 0; s < splits; ++s)
      value += partial_values<C>(p, s, number)[n] * exp2_of((tops[s * p.rows_of_all] - safe) * c);
    out[n] = narrow<T>(value * inverse);
  }
  if (lane == 0) store_sums(p, number, top, sum);
}

}  // namespace fastnn::cuda

// What every attention kernel shares: the scores of a strip of queries against a block of keys (scale, soft cap, mask,
// causal and window limits), the exponential of softmax, and the dropout mask.
//
// Scores leave here as s with a factor c, so that softmax takes 2^(c·s - c·max): scale and log2(e) cost nothing where
// there is no mask.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "cpu/activation.inl"
#include "cpu/gemm.inl"
#include "fastnn/attention.h"

namespace fastnn::cpu::FASTNN_ISA {

template <class C>
inline constexpr C kLog2E = C(1.44269504088896340735992468100189214);
template <class C>
inline constexpr C kNegativeInfinity = -std::numeric_limits<C>::infinity();

// vexp2_nonpositive of activation.inl, for double.
FASTNN_INLINE Vec<double> vexp2_nonpositive(Vec<double> x) {
  constexpr double p[] = {1.0,
                          0.6931471805599453,
                          0.2402265069591007,
                          0.055504108664821576,
                          0.009618129107628477,
                          0.0013333558146428441,
                          0.00015403530393381606,
                          1.5252733804059838e-05,
                          1.3215486790144305e-06,
                          1.0178086009239696e-07,
                          7.054911620801121e-09,
                          4.44553827187081e-10,
                          2.5678435993488196e-11,
                          1.3691488853904124e-12};
  constexpr double magic = 6755399441055744.0 + 1023.0;  // 1.5 · 2^52
  const Vec<double> low = vmax(splat(-1023.0), x);
  const Vec<double> shifted = low + magic;
  return polynomial(low - (shifted - magic), p) * bitcast<Vec<double>>(bitcast<Vec<int64_t>>(shifted) << 52);
}
template <class C>
FASTNN_INLINE C exp2_nonpositive(C x) {
  return vexp2_nonpositive(splat<C>(x))[0];
}

// log(x) for the normal x > 0 that sums of exponentials are; NaN and infinity stay.
FASTNN_INLINE Vec<float> vlog(Vec<float> x) {
  const Vec<int32_t> bits = bitcast<Vec<int32_t>>(x);
  const Vec<float> mantissa = bitcast<Vec<float>>((bits & 0x7fffff) | 0x3f800000);
  const Vec<float> exponent = __builtin_convertvector((bits >> 23) - 127, Vec<float>);
  const Vec<float> y = fma(exponent, splat(0.693147181f), vlog1p_unit(mantissa - 1.0f));
  return x < std::numeric_limits<float>::infinity() ? y : x;
}
FASTNN_INLINE Vec<double> vlog(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return std::log(v); });
}

// ---- strips --------------------------------------------------------------------------------------------------------

// The rows of a kernel are the queries of all heads of a group: row r is query r % L of head item · group + r / L.
struct Row {
  int64_t head, query;
};
inline Row row_of(const AttentionParams& p, int64_t item, int64_t r) {
  return {item * p.group + r / p.query_length, r % p.query_length};
}

// Keys that a query may see, as a half-open range.
inline Range visible_keys(const AttentionParams& p, int64_t query) {
  const int64_t begin = std::clamp<int64_t>(query + p.first_shift, 0, p.key_length);
  const int64_t end = std::clamp<int64_t>(query + p.last_shift + 1, begin, p.key_length);
  return {begin, end};
}
// Keys that any of the rows [r0, r1) may see. Limits grow with the query, so the ends of each head's run are enough.
inline Range visible_keys(const AttentionParams& p, int64_t r0, int64_t r1) {
  const int64_t L = p.query_length;
  const bool wraps = r0 / L != (r1 - 1) / L;
  const Range first = visible_keys(p, wraps ? 0 : r0 % L), last = visible_keys(p, wraps ? L - 1 : (r1 - 1) % L);
  return {first.begin, std::max(first.end, last.end)};
}

// Whether scores need more than a factor: a mask, a soft cap, or a factor that would turn -infinity around.
inline bool has_score_pass(const AttentionParams& p) {
  return p.mask_type != AttentionMask::None || p.softcap != 0 || !(p.scale > 0);
}
// The c that goes with finished scores.
template <class C>
inline C score_factor(const AttentionParams& p) {
  return has_score_pass(p) ? kLog2E<C> : static_cast<C>(p.scale * 1.44269504088896340735992468100189214);
}

// Exponents c · s - c · top are fma(s - from, c, shift): top goes into the shift, whose rounding all keys share. A top
// that is huge, as of a row masked by the least finite number, would overflow there or leave its rounding error for a
// score: it is taken off first.
template <class C>
struct Exponent {
  Vec<C> from, factor, shift;
  Exponent(C top, C c, C top_factor) : factor(splat<C>(c)) {
    const bool huge = top < C(-1 << 20) && top > kNegativeInfinity<C>;
    from = splat<C>(huge ? top : C(0)), shift = splat<C>(huge ? C(0) : -top * top_factor);
  }
  FASTNN_INLINE Vec<C> operator()(Vec<C> s) const { return fma(s - from, factor, shift); }
};

// What a query gets that has no key to see.
template <class C>
inline C value_of_unseen(const AttentionParams& p) {
  return p.nan_unseen && p.key_length > 0 ? std::numeric_limits<C>::quiet_NaN() : C(0);
}

// s = s · scale + mask.
template <class C, class M>
inline void add_mask(const M* mask, int64_t stride, int64_t count, C scale, C* s) {
  constexpr int L = kLanes<C>;
  int64_t j = 0;
  if (stride == 0) {
    const Vec<C> x = splat<C>(static_cast<C>(load_one(mask)));
    for (; j + L <= count; j += L) store(s + j, fma(load(s + j), splat<C>(scale), x));
  } else if constexpr (std::is_same_v<Compute<M>, C>) {
    for (; stride == 1 && j + L <= count; j += L) store(s + j, fma(load(s + j), splat<C>(scale), load(mask + j)));
  }
  for (; j < count; ++j) s[j] = s[j] * scale + static_cast<C>(load_one(mask + j * stride));
}
template <class C>
inline void apply_bool_mask(const uint8_t* mask, int64_t stride, int64_t count, C scale, C* s) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) s[j] = mask[j] ? s[j] * scale : kNegativeInfinity<C>;
  } else {
    for (int64_t j = 0; j < count; ++j) s[j] = mask[j * stride] ? s[j] * scale : kNegativeInfinity<C>;
  }
}

// Finishes the raw products of one row with the keys [k0, k0 + count); `padded` ones, up to a whole number of vectors,
// may be read and written, and become -infinity past `count`. `slope`, if given, takes d(score)/d(scale · product).
template <class T, class C = Compute<T>>
inline void finish_scores(const AttentionParams& p, const Row& row, int64_t k0, int64_t count, int64_t padded, C* s,
                          C* slope = nullptr) {
  if (has_score_pass(p)) {
    C scale = p.head_dim == 0 ? C(1) : static_cast<C>(p.scale);
    if (p.softcap != 0) {
      const C inner = static_cast<C>(scale / p.softcap), cap = static_cast<C>(p.softcap);
      for (int64_t j = 0; j < padded; j += kLanes<C>) {
        const Vec<C> t = vtanh(load(s + j) * inner);
        store(s + j, t * cap);
        if (slope) store(slope + j, C(1) - t * t);
      }
      scale = C(1);
    }
    const int64_t at = p.mask_type == AttentionMask::None
                           ? 0
                           : p.mask.offset[row.head] + row.query * p.mask.row_stride + k0 * p.mask.col_stride;
    switch (p.mask_type) {
      case AttentionMask::None:
        for (int64_t j = 0; j < padded; j += kLanes<C>) store(s + j, load(s + j) * scale);
        break;
      case AttentionMask::Bool:
        apply_bool_mask(static_cast<const uint8_t*>(p.mask.data) + at, p.mask.col_stride, count, scale, s);
        break;
      case AttentionMask::Query:
        add_mask(static_cast<const T*>(p.mask.data) + at, p.mask.col_stride, count, scale, s);
        break;
      case AttentionMask::Float32:
        add_mask(static_cast<const float*>(p.mask.data) + at, p.mask.col_stride, count, scale, s);
        break;
    }
  }
  const Range keys = visible_keys(p, row.query);
  for (int64_t j = 0; j < std::min(keys.begin - k0, padded); ++j) s[j] = kNegativeInfinity<C>;
  for (int64_t j = std::max<int64_t>(std::min(keys.end - k0, count), 0); j < padded; ++j) s[j] = kNegativeInfinity<C>;
}

// Packs rows [r0, r0 + rows) of one operand (query or grad_output) into a strip [depth][MR]; missing rows become zero.
template <class C, class T>
inline void pack_strip(const AttentionParams& p, const AttentionOperand& x, int64_t item, int64_t r0, int64_t rows,
                       int64_t depth, C* dst) {
  constexpr int MR = kMR<C>;
  const Row first = row_of(p, item, r0), last = row_of(p, item, r0 + rows - 1);
  const T* data = static_cast<const T*>(x.data);
  if (first.head == last.head) {
    pack_panel<MR>(data + x.offset[first.head] + first.query * x.row_stride, x.row_stride, x.col_stride, rows, depth,
                   dst);
    return;
  }
  for (int64_t i = 0; i < MR; ++i) {
    if (i >= rows) {
      for (int64_t e = 0; e < depth; ++e) dst[e * MR + i] = C(0);
      continue;
    }
    const Row row = row_of(p, item, r0 + i);
    const T* line = data + x.offset[row.head] + row.query * x.row_stride;
    for (int64_t e = 0; e < depth; ++e) dst[e * MR + i] = load_one(line + e * x.col_stride);
  }
}

// Asks for `count` rows of `width` elements: the arithmetic on what is here hides the way of what comes next.
template <class T>
FASTNN_INLINE void prefetch_rows(const T* data, int64_t stride, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t e = 0; e < width; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(data + i * stride + e);
}

// Packs positions [k0, k0 + count) of key or value so that positions are columns: panels [depth][NR]. Rows lie far apart,
// so the next ones are asked for.
template <class C, class T>
inline void pack_positions_as_columns(const AttentionOperand& x, int64_t offset, int64_t k0, int64_t count,
                                      int64_t depth, C* dst) {
  constexpr int64_t NR = kNR<C>;
  const T* data = static_cast<const T*>(x.data) + offset + k0 * x.row_stride;
  for (int64_t j = 0; j < count; j += NR) {
    if (x.col_stride == 1)
      prefetch_rows(data + (j + NR) * x.row_stride, x.row_stride, std::min(NR, count - j - NR), depth);
    pack_panel<NR>(data + j * x.row_stride, x.row_stride, x.col_stride, std::min(NR, count - j), depth,
                   dst + j * depth);
  }
}
// … and so that features are columns: panels [count][NR].
template <class C, class T>
inline void pack_features_as_columns(const AttentionOperand& x, int64_t offset, int64_t k0, int64_t count,
                                     int64_t depth, C* dst) {
  constexpr int64_t NR = kNR<C>, L = kLanes<C>, AHEAD = 8;
  const T* data = static_cast<const T*>(x.data) + offset + k0 * x.row_stride;
  int64_t n = 0;
  if (x.col_stride == 1) {  // whole rows, of all panels that are full
    for (int64_t k = 0; k < count; ++k) {
      prefetch_rows(data + (k + AHEAD) * x.row_stride, 0, k + AHEAD < count, depth);
      const T* const row = data + k * x.row_stride;
      for (n = 0; n + NR <= depth; n += NR) {
        C* const to = dst + n * count + k * NR;
        store(to, load(row + n));
        store(to + L, load(row + n + L));
      }
    }
  }
  for (; n < depth; n += NR)
    pack_panel<NR>(data + n * x.col_stride, x.col_stride, x.row_stride, std::min(NR, depth - n), count,
                   dst + n * count);
}

// tile[i][:] = sum over k < depth of a[i * row_stride + k * k_stride] * b[k * NR + :]: A not packed, on a packed panel.
template <class C, int ROWS>
FASTNN_INLINE void micro_kernel_strided(int64_t depth, const C* __restrict a, int64_t row_stride, int64_t k_stride,
                                        const C* __restrict b, Tile<C, ROWS>& tile) {
  constexpr int NR = kNR<C>, L = kLanes<C>;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) tile.acc[i][0] = tile.acc[i][1] = zero<C>();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, a += k_stride, b += NR) {
    const Vec<C> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<C> x = splat<C>(a[i * row_stride]);
      tile.acc[i][0] = fma(x, b0, tile.acc[i][0]);
      tile.acc[i][1] = fma(x, b1, tile.acc[i][1]);
    }
  }
}

// The A of a strip: rows along the depth, `row_stride` apart; or packed, [depth][MR], where row_stride is 0.
template <class C>
struct Strip {
  const C* data;
  int64_t row_stride;
};
// Rows [row, row + rows) of one head where they lie, if the micro-kernel can take them so; else data is null. It computes
// the smallest compiled number of rows, so there must be one of just this many.
template <class C, class T>
inline Strip<C> strip_in_place(const AttentionOperand& x, int64_t head, int64_t row, int64_t rows) {
  if constexpr (std::is_same_v<C, T>) {
    bool exact = false;
    with_rows<C>(rows, [&](auto height) { exact = decltype(height)::value == rows; });
    if (exact && x.col_stride == 1 && x.row_stride != 0)
      return {static_cast<const C*>(x.data) + x.offset[head] + row * x.row_stride, x.row_stride};
  }
  return {nullptr, 0};
}

// s[i * stride + j] = strip of queries (or gradients) times packed positions; columns up to a multiple of NR.
template <class C>
__attribute__((noinline)) void strip_products(const Strip<C>& strip, const C* panels, int64_t rows, int64_t count,
                                              int64_t depth, C* s, int64_t stride) {
  constexpr int64_t NR = kNR<C>;
  const auto each = [&](const auto& multiply) __attribute__((always_inline)) {
    with_rows<C>(rows, [&](auto height) __attribute__((always_inline)) {
      constexpr int ROWS = decltype(height)::value;
      for (int64_t j = 0; j < count; j += NR) {
        Tile<C, ROWS> tile;
        multiply(panels + j * depth, tile);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          store(s + i * stride + j, tile.acc[i][0]);
          store(s + i * stride + j + kLanes<C>, tile.acc[i][1]);
        }
      }
    });
  };
  if (strip.row_stride) {
    each([&]<int ROWS>(const C* panel, Tile<C, ROWS>& tile) __attribute__((always_inline)) {
      micro_kernel_strided<C, ROWS>(depth, strip.data, strip.row_stride, 1, panel, tile);
    });
  } else {
    each([&]<int ROWS>(const C* panel, Tile<C, ROWS>& tile) __attribute__((always_inline)) {
      micro_kernel<C, ROWS>(depth, strip.data, panel, next_panel(panel + NR * depth, depth, 0, 1), tile);
    });
  }
}

// ---- dropout -------------------------------------------------------------------------------------------------------

inline void philox(uint64_t seed, uint32_t c0_first, uint32_t c1, uint32_t c2, uint32_t out[32]) {
  uint32_t x0[8], x1[8], x2[8], x3[8];
  for (int i = 0; i < 8; ++i) x0[i] = c0_first + i, x1[i] = c1, x2[i] = c2, x3[i] = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t a = uint64_t{0xD2511F53} * x0[i], b = uint64_t{0xCD9E8D57} * x2[i];
      x0[i] = static_cast<uint32_t>(b >> 32) ^ x1[i] ^ key0;
      x1[i] = static_cast<uint32_t>(b);
      x2[i] = static_cast<uint32_t>(a >> 32) ^ x3[i] ^ key1;
      x3[i] = static_cast<uint32_t>(a);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int i = 0; i < 8; ++i) out[i] = x0[i], out[8 + i] = x1[i], out[16 + i] = x2[i], out[24 + i] = x3[i];
}

// to[j] = kept ? from[j] : 0 for the keys [k0, k0 + count); k0 a multiple of 32.
template <class C>
inline void drop(const AttentionParams& p, const Row& row, int64_t k0, int64_t count, const C* from, C* to) {
  const double limit = p.dropout_p * 4294967296.0;
  const uint32_t threshold = limit >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(limit);
  for (int64_t j = 0; j < count; j += 32) {
    alignas(64) uint32_t words[32];
    philox(p.philox_seed, static_cast<uint32_t>((k0 + j) / 4), static_cast<uint32_t>(row.query),
           static_cast<uint32_t>(row.head), words);
    const int64_t n = std::min<int64_t>(32, count - j);
    for (int64_t i = 0; i < n; ++i) to[j + i] = words[i] >= threshold ? from[j + i] : C(0);
  }
}
// 1 / (1 - p); 0 where everything is dropped.
inline double keep_scale(const AttentionParams& p) { return p.dropout_p >= 1 ? 0.0 : 1.0 / (1.0 - p.dropout_p); }

}  // namespace fastnn::cpu::FASTNN_ISA

// What tests of attention share: operands of any layout, a case, and cases drawn at random.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/isa_baseline.h"
#include "cpu/attention_scores.inl"
#include "cpu/isa_end.h"

#include "cuda/attention_launch.h"
#include "problem.h"

namespace fastnn::cuda {

inline int failures = 0, cases = 0, every = 1, turn = 0;

inline int pick(std::initializer_list<int> values) { return values.begin()[generator() % values.size()]; }
inline bool chance(int percent) { return static_cast<int>(generator() % 100) < percent; }

// [batch, heads, positions, features] by strides: heads inside positions, positions inside heads, features apart, or
// positions next to each other; `shift` elements off alignment, `gap` elements between rows.
enum Order { HeadsFirst, PositionsFirst, Apart, Transposed };
struct Placed {
  int order = HeadsFirst, gap = 0, shift = 0;
};
template <class T>
struct Operand {
  Operand(std::array<int64_t, 4> n, const Placed& placed, double (*draw)()) : size(n), buffer(0) {
    const int64_t row = n[3] * (placed.order == Apart ? 2 : 1) + placed.gap;
    stride[3] = placed.order == Apart ? 2 : placed.order == Transposed ? n[2] + placed.gap : 1;
    stride[2] = placed.order == PositionsFirst ? n[1] * row : placed.order == Transposed ? 1 : row;
    stride[1] = placed.order == PositionsFirst ? row : placed.order == Transposed ? n[3] * stride[3] : n[2] * row;
    stride[0] = placed.order == PositionsFirst ? n[2] * stride[2] : n[1] * stride[1];
    int64_t last = placed.shift;
    for (int i = 0; i < 4; ++i) last += (n[i] - 1) * stride[i];
    buffer = Buffer<T>(std::min({n[0], n[1], n[2], n[3]}) > 0 ? last + 1 : placed.shift);
    data = buffer.data.get() + placed.shift;
    for (int64_t i = 0; i < buffer.size; ++i) buffer.data[i] = make(NAN);
    for (int64_t b = 0; b < n[0]; ++b)
      for (int64_t h = 0; h < n[1]; ++h) {
        offset.push_back(b * stride[0] + h * stride[1]);
        for (int64_t i = 0; draw && i < n[2]; ++i)
          for (int64_t e = 0; e < n[3]; ++e) data[offset.back() + i * stride[2] + e * stride[3]] = make(draw());
      }
  }
  static T make(double x) {
    if constexpr (std::is_same_v<T, uint8_t>)
      return x > 0 ? static_cast<uint8_t>(generator() % 255 + 1) : 0;
    else
      return from_double<T>(x);
  }
  double at(int64_t matrix, int64_t i, int64_t e) const {
    const T x = data[offset[matrix] + i * stride[2] + e * stride[3]];
    if constexpr (std::is_same_v<T, uint8_t>)
      return x ? 0 : -INFINITY;
    else
      return to_double(x);
  }
  AttentionOperand operand() const { return {data, offset.data(), stride[2], stride[3]}; }
  AttentionResult result() const { return {data, offset.data(), stride[2]}; }
  std::array<int64_t, 4> size, stride;
  Buffer<T> buffer;
  T* data;
  std::vector<int64_t> offset;
};

struct Case {
  AttentionKernel kernel = AttentionKernel::Mma;
  int tile = 0, splits = 1;
  bool packed = false, planned = false;  // planned: by the device's own plan
  int64_t batch = 1, heads = 1, group = 1, L = 1, S = 1, D = 1, V = 1;
  Placed query = {}, key = {}, value = {}, output = {};
  AttentionMask mask = AttentionMask::None;
  int mask_broadcast = 0, mask_order = HeadsFirst, mask_shift = 0;  // bits: of batch, heads, queries, keys
  int64_t first = -kAttentionNoLimit, last = kAttentionNoLimit;
  double scale = 0.3, softcap = 0, dropout = 0;
  bool nan_unseen = false, sums = false, seed_on_device = false;
  bool hidden = false;  // rows of an added mask that are finite and huge

  std::string text() const {
    char line[512];
    std::snprintf(
        line, sizeof line,
        "kernel %d tile %d splits %d packed %d | batch %ld heads %ld group %ld L %ld S %ld D %ld V %ld | query "
        "%d %d %d key %d %d %d value %d %d %d output %d | mask %d broadcast %d order %d shift %d | first %ld "
        "last %ld scale %g softcap %g dropout %g hidden %d",
        static_cast<int>(kernel), tile, splits, packed, batch, heads, group, L, S, D, V, query.order, query.gap,
        query.shift, key.order, key.gap, key.shift, value.order, value.gap, value.shift, output.order,
        static_cast<int>(mask), mask_broadcast, mask_order, mask_shift, first, last, scale, softcap, dropout, hidden);
    return line;
  }
};

inline double mask_draw() { return chance(20) ? -INFINITY : normal(); }
inline double bool_draw() { return chance(70); }

// Rows masked wholly, but for what is -infinity, by the least finite number and by others in which scores vanish, and
// columns that are masked so in every row.
template <class M>
void hide(Operand<M>& mask) {
  const double least = std::is_same_v<M, Float16>    ? -65504.0
                       : std::is_same_v<M, BFloat16> ? -0x1.fep127
                       : std::is_same_v<M, float>    ? -0x1.fffffep127
                                                     : -0x1.fffffffffffffp1023;
  const double values[] = {least, -1e9, -1e30};
  for (const int64_t at : mask.offset)
    for (int64_t i = 0; i < mask.size[2]; ++i)
      for (int64_t e = 0; e < mask.size[3]; ++e) {
        M& x = mask.data[at + i * mask.stride[2] + e * mask.stride[3]];
        if (std::isinf(to_double(x))) continue;
        if (i % 3 == 0) x = from_double<M>(std::max(values[i / 3 % 3], least));
        if (e % 5 == 4) x = from_double<M>(least);
      }
}
// A score with what is added to it. A huge number is added in C, as the kernel does it: its rounding swallows the score,
// and the kernel's errors with it.
inline bool swallows(double added) { return added < -1e6 && std::isfinite(added); }
template <class C>
double masked_score(double score, double added) {
  return swallows(added) ? static_cast<C>(added) + static_cast<C>(score) : score + added;
}

// The mask of a case, its offsets those of all heads; where it is broadcast it has strides of 0.
template <class M>
Operand<M> mask_of(const Case& c, double (*draw)()) {
  const auto kept = [&](int bit, int64_t n) { return c.mask_broadcast >> bit & 1 ? std::min<int64_t>(n, 1) : n; };
  Operand<M> mask({kept(0, c.batch), kept(1, c.heads), kept(2, c.L), kept(3, c.S)}, {c.mask_order, 0, c.mask_shift},
                  c.mask == AttentionMask::None ? nullptr : draw);
  if constexpr (!std::is_same_v<M, uint8_t>)
    if (c.hidden && c.mask != AttentionMask::None) hide(mask);
  std::vector<int64_t> offset;
  for (int64_t h = 0; h < c.batch * c.heads; ++h) {
    const int64_t b = c.mask_broadcast & 1 ? 0 : h / c.heads, own = c.mask_broadcast & 2 ? 0 : h % c.heads;
    offset.push_back(b * mask.stride[0] + own * mask.stride[1]);
  }
  if (c.mask_broadcast & 4) mask.stride[2] = 0;
  if (c.mask_broadcast & 8) mask.stride[3] = 0;
  mask.offset = offset;
  return mask;
}
// f(an element of the mask, what draws it)
template <class T, class F>
void with_mask_type(const Case& c, const F& f) {
  switch (c.mask) {
    case AttentionMask::Bool: return f(uint8_t{}, bool_draw);
    case AttentionMask::Float32: return f(float{}, mask_draw);
    default: return f(T{}, mask_draw);
  }
}

// f(the case with each kind of added mask, whose rows hide)
template <class F>
void with_hidden_rows(Case c, const F& f) {
  c.hidden = true;
  for (const AttentionMask mask : {AttentionMask::Query, AttentionMask::Float32}) c.mask = mask, f(c);
}

// All that the case says, but for where results other than the output go.
template <class T, class M>
AttentionParams params_of(const Case& c, const Operand<T>& query, const Operand<T>& key, const Operand<T>& value,
                          const Operand<T>& output, const Operand<M>& mask) {
  AttentionParams p = {};
  p.dtype = dtype_of<T>, p.heads = c.batch * c.heads, p.group = c.group;
  p.query_length = c.L, p.key_length = c.S, p.head_dim = c.D, p.value_dim = value.size[3];
  p.query = query.operand(), p.key = key.operand(), p.value = value.operand(), p.output = output.result();
  p.mask_type = c.mask;
  if (c.mask != AttentionMask::None) p.mask = mask.operand();
  p.scale = c.scale, p.softcap = c.softcap, p.dropout_p = c.dropout;
  p.philox_seed = 0x123456789abcdef0u + cases;
  p.first_shift = c.first, p.last_shift = c.last, p.nan_unseen = c.nan_unseen;
  return p;
}

inline Placed random_placed() {
  if (chance(40)) return {};
  return {pick({HeadsFirst, PositionsFirst, PositionsFirst, Apart, Transposed}), pick({0, 0, 1, 2, 4, 8}),
          pick({0, 0, 1, 2, 4})};
}
inline void random_window(Case& c) {
  if (chance(40)) return;
  const int64_t shift = chance(50) ? c.S - c.L : 0;
  if (chance(60)) c.last = shift + pick({0, 0, 1, 5, 40, -3, -70});
  if (chance(50)) c.first = shift - pick({0, 1, 7, 33, 100, -2});
}
inline void random_general(Case& c) {
  c.mask = static_cast<AttentionMask>(pick({0, 1, 2, 3}));
  c.mask_broadcast = static_cast<int>(generator() % 16),
  c.mask_order = pick({HeadsFirst, PositionsFirst, Apart, Transposed});
  c.mask_shift = pick({0, 0, 1, 2});
  if (chance(30)) c.softcap = pick({1, 5, 50});
  if (chance(30)) c.dropout = pick({1, 5, 9, 10}) / 10.0;
  if (chance(20)) c.scale = pick({-1, 0, 2}) * 0.25;
  c.seed_on_device = chance(50), c.hidden = chance(30);
}
inline void random_rest(Case& c) {
  c.query = random_placed(), c.key = random_placed(), c.value = random_placed();
  c.output = random_placed();
  if (c.output.order >= Apart) c.output.order = PositionsFirst;
  random_window(c);
  c.nan_unseen = chance(50), c.sums = chance(50);
}

}  // namespace fastnn::cuda

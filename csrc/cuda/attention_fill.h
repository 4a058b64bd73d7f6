// From the contract's params to what kernels of attention read, on the host; and launches that name the problem.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/attention_launch.h"
#include "cuda/attention_scores.cuh"
#include "cuda/launch.cuh"

namespace fastnn::cuda {

inline constexpr int64_t kMostPositions = int64_t{1} << 30;

inline int64_t size_of(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

// The digits and strides behind a list of offsets, or false where there are none. A run of equal steps ends where a
// digit does: had it ended further, the two digits would be one.
inline bool head_offsets(const int64_t* offset, int64_t heads, HeadOffsets& at) {
  at = {};
  at.first = heads > 0 ? offset[0] : 0;
  for (int64_t unit = 1, size; unit < heads; unit *= size) {
    const int64_t stride = offset[unit] - offset[0];
    for (size = 1; size * unit < heads && offset[size * unit] - offset[0] == size * stride;) ++size;
    if (at.digits == kHeadDigits || heads % (unit * size)) return false;
    for (int64_t i = 1; i < size; ++i)  // what the faster digits told holds for every turn of this one
      for (int64_t j = 1; j < unit; ++j)
        if (offset[i * unit + j] != offset[j] + i * stride) return false;
    at.size[at.digits] = static_cast<uint32_t>(size), at.stride[at.digits++] = stride;
  }
  return true;
}

// The widest copy, in bytes, that the start of every row allows, where features lie next to each other.
inline int row_width(const AttentionRows& rows, int64_t size) {
  uint64_t bits = reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(rows.heads.first * size);
  for (int i = 0; i < rows.heads.digits; ++i) bits |= static_cast<uint64_t>(rows.heads.stride[i] * size);
  bits |= static_cast<uint64_t>(rows.row_stride * size);
  for (int width = 16; width > size; width /= 2)
    if (bits % width == 0) return width;
  return static_cast<int>(size);
}

template <class Operand>
bool fill_rows(AttentionRows& to, const Operand& x, int64_t col_stride, int64_t heads, int64_t positions,
               int64_t size) {
  to.data = x.data, to.col_stride = col_stride;
  to.row_stride = positions > 1 ? x.row_stride : 0;  // rows that are not there have addresses, too
  if (!head_offsets(x.offset, heads, to.heads)) return false;
  to.width = row_width(to, size);
  return true;
}

inline bool needs_more_than_a_factor(const AttentionParams& p) {
  return p.mask_type != AttentionMask::None || p.softcap != 0 || !(p.scale > 0);
}

// f(label); a label's sizes live no longer than the variable that was made of them.
template <class F>
Status with_label(const char* kernel, const AttentionParams& p, const AttentionPlan& plan, const F& f) {
  const Label label = {kernel,
                       {{"heads", p.heads},
                        {"group", p.group},
                        {"queries", p.query_length},
                        {"keys", p.key_length},
                        {"head_dim", p.head_dim},
                        {"value_dim", p.value_dim},
                        {"bytes", size_of(p.dtype)},
                        {"tile", plan.tile},
                        {"splits", plan.splits}}};
  return f(label);
}
inline Status refused(const char* kernel, const AttentionParams& p, const AttentionPlan& plan, const char* reason) {
  return with_label(kernel, p, plan, [&](const Label& label) { return failed(label, cudaErrorInvalidValue, reason); });
}
// As launch() has it.
template <class Kernel, class... Arguments>
Status launch_labelled(const char* name, const AttentionParams& p, const AttentionPlan& plan, Kernel* kernel, dim3 grid,
                       int threads, int shared_bytes, Stream stream, const Arguments&... arguments) {
  return with_label(name, p, plan, [&](const Label& label) {
    return launch(label, kernel, grid, threads, shared_bytes, stream, arguments...);
  });
}

// What a kernel reads, but for the plan; the reason where it cannot be said.
inline const char* fill(const AttentionParams& p, const int64_t* philox_seed, AttentionForward& f) {
  const int64_t size = size_of(p.dtype), L = p.query_length, S = p.key_length;
  if (std::max({L, S, p.head_dim, p.value_dim}) >= kMostPositions) return "a dimension above 2^30";
  if (p.heads >= kMostPositions) return "more than 2^30 heads";
  f = {};
  const auto rows = [&](AttentionRows& to, const auto& x, int64_t col_stride, int64_t heads, int64_t positions) {
    return fill_rows(to, x, col_stride, heads, positions, size);
  };
  const int64_t group = std::max<int64_t>(p.group, 1);
  bool told = rows(f.query, p.query, p.head_dim > 1 ? p.query.col_stride : 1, p.heads, L) &&
              rows(f.key, p.key, p.head_dim > 1 ? p.key.col_stride : 1, p.heads / group, S) &&
              rows(f.value, p.value, p.value_dim > 1 ? p.value.col_stride : 1, p.heads / group, S) &&
              rows(f.output, p.output, 1, p.heads, L);
  f.mask_type = p.mask_type;
  if (p.mask_type != AttentionMask::None) {
    const int64_t bytes = p.mask_type == AttentionMask::Bool ? 1 : p.mask_type == AttentionMask::Float32 ? 4 : size;
    told = told && rows(f.mask, p.mask, p.mask.col_stride, p.heads, L);
    f.mask.width = p.mask.col_stride == 1 && row_width(f.mask, bytes) >= 2 * bytes ? 2 : 1;
  }
  if (!told) return "leading dimensions that six strides cannot tell";
  f.query_length = static_cast<int>(L), f.key_length = static_cast<int>(S);
  f.head_dim = static_cast<int>(p.head_dim), f.value_dim = static_cast<int>(p.value_dim);
  f.group = static_cast<int>(group);
  f.first_shift = static_cast<int>(std::clamp(p.first_shift, -L, S));
  f.last_shift = static_cast<int>(std::clamp(p.last_shift, -L - 1, S));
  // As the CPU's kernels have it: where a factor is enough, the largest score is a bare product.
  const double log2e = kLog2E<double>;
  const bool more = needs_more_than_a_factor(p);
  const double scale = p.head_dim == 0 ? 1.0 : p.scale;
  f.factor = more ? log2e : p.scale * log2e;
  f.scale = !more ? 1.0 : p.softcap != 0 ? scale / p.softcap : scale;
  f.softcap = p.softcap;
  f.keep = p.dropout_p >= 1 ? 0.0 : 1.0 / (1.0 - p.dropout_p);
  f.unseen = p.nan_unseen && S > 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  const double limit = p.dropout_p * 4294967296.0;
  f.drop_below = limit >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(limit);
  f.philox_seed = p.philox_seed, f.philox_seed_at = reinterpret_cast<const uint64_t*>(philox_seed);
  f.lse = p.lse, f.maximum = p.maximum, f.sum = p.sum;
  f.rows_of_all = p.heads * L;
  return nullptr;
}

// And the plan.
inline void fill_plan(const AttentionPlan& plan, AttentionForward& f) {
  f.heads_of_item = plan.heads, f.rows = plan.heads * f.query_length;
  const int tile_rows = attention_rows(plan.kernel, plan.tile);
  f.row_tiles = (f.rows + tile_rows - 1) / tile_rows;
  f.first_tile = static_cast<int>(plan.first_tile), f.tiles_per_split = static_cast<int>(plan.tiles_per_split);
}

}  // namespace fastnn::cuda

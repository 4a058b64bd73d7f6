// attention on CUDA, host side: the plan, the kernel that it names, the launch.
#include <algorithm>
#include <limits>

#include "cuda/attention_launch.h"
#include "cuda/attention_simt.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/launch.cuh"

namespace fastnn::cuda {
namespace {

constexpr int64_t kMostPositions = int64_t{1} << 30;

int64_t size_of(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

// The digits and strides behind a list of offsets, or false where there are none. A run of equal steps ends where a digit
// does: had it ended further, the two digits would be one.
bool head_offsets(const int64_t* offset, int64_t heads, HeadOffsets& at) {
  at = {};
  at.first = heads > 0 ? offset[0] : 0;
  for (int64_t unit = 1; unit < heads;) {
    if (at.digits == kHeadDigits) return false;
    const int64_t stride = offset[unit] - offset[0], most = heads / unit;
    int64_t size = 1;
    while (size < most && offset[size * unit] - offset[0] == size * stride) ++size;
    at.size[at.digits] = static_cast<uint32_t>(size), at.stride[at.digits++] = stride;
    if (heads % (unit * size)) return false;
    unit *= size;
  }
  for (int64_t h = 0; h < heads; ++h)
    if (at(static_cast<uint32_t>(h)) != offset[h]) return false;
  return true;
}

// The widest copy, in bytes, that the start of every row allows, where features lie next to each other.
int row_width(const AttentionRows& rows, int64_t size) {
  uint64_t bits = reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(rows.heads.first * size);
  for (int i = 0; i < rows.heads.digits; ++i) bits |= static_cast<uint64_t>(rows.heads.stride[i] * size);
  bits |= static_cast<uint64_t>(rows.row_stride * size);
  for (int width = 16; width > size; width /= 2)
    if (bits % width == 0) return width;
  return static_cast<int>(size);
}

bool needs_more_than_a_factor(const AttentionParams& p) {
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
Status refused(const char* kernel, const AttentionParams& p, const AttentionPlan& plan, const char* reason) {
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

// What the kernel reads; the reason where it cannot be said.
const char* fill(const AttentionParams& p, const AttentionPlan& plan, AttentionForward& f) {
  const int64_t size = size_of(p.dtype), L = p.query_length, S = p.key_length;
  if (std::max({L, S, p.head_dim, p.value_dim, L * plan.heads}) >= kMostPositions) return "a dimension above 2^30";
  if (p.heads >= kMostPositions) return "more than 2^30 heads";
  f = {};
  const auto rows = [&](AttentionRows& to, const auto& x, int64_t col_stride, int64_t heads, int64_t positions) {
    to.data = x.data, to.col_stride = col_stride;
    to.row_stride = positions > 1 ? x.row_stride : 0;  // rows that are not there have addresses, too
    if (!head_offsets(x.offset, heads, to.heads)) return false;
    to.width = row_width(to, size);
    return true;
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
  f.heads_of_item = plan.heads, f.group = static_cast<int>(group), f.rows = static_cast<int>(plan.heads * L);
  const int tile_rows = attention_rows(plan.kernel, plan.tile);
  f.row_tiles = (f.rows + tile_rows - 1) / tile_rows;
  f.first_shift = static_cast<int>(std::clamp(p.first_shift, -L, S));
  f.last_shift = static_cast<int>(std::clamp(p.last_shift, -L - 1, S));
  f.first_tile = static_cast<int>(plan.first_tile), f.tiles_per_split = static_cast<int>(plan.tiles_per_split);
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
  f.philox_seed = p.philox_seed;
  f.lse = p.lse, f.maximum = p.maximum, f.sum = p.sum;
  f.rows_of_all = p.heads * L;
  return nullptr;
}

template <class T, int TILE = 0>
Status launch_mma(const AttentionParams& p, const AttentionPlan& plan, const AttentionForward& f, dim3 grid,
                  int capability, Stream stream) {
  if constexpr (TILE == kAttentionTileCount) {
    return {};
  } else {
    if (plan.tile != TILE) return launch_mma<T, TILE + 1>(p, plan, f, grid, capability, stream);
    return launch_labelled("attention_mma_kernel", p, plan, attention_mma_kernel<T, TILE>, grid, kAttentionThreads,
                           attention_shared_bytes(kAttentionTiles[TILE], 10 * capability), stream, f);
  }
}

template <class T>
Status run(const AttentionParams& p, const AttentionPlan& plan, const AttentionForward& f, Stream stream) {
  const Device device = current_device();
  const int64_t blocks = p.heads / plan.heads * f.row_tiles;
  if (blocks > std::numeric_limits<int32_t>::max())
    return refused("attention", p, plan, "more blocks than a grid holds");
  dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.splits));
  Status status;
  if (plan.kernel == AttentionKernel::Mma) {
    const bool fits =
        attention_fits(attention_problem(p), kAttentionTiles[plan.tile], device.capability, device.shared_bytes);
    if constexpr (sizeof(T) == 2)
      if (fits) status = launch_mma<T>(p, plan, f, grid, device.capability, stream);
    if (!fits) status = refused("attention_mma_kernel", p, plan, "a tile that does not fit");
  } else {
    constexpr int columns = sizeof(T) == 8 ? 64 : 128;
    grid.z = static_cast<unsigned>(std::max<int64_t>((p.value_dim + columns - 1) / columns, 1));
    const char* const name = "attention_simt_kernel";
    status = plan.tile == 0 ? launch_labelled(name, p, plan, attention_simt_kernel<T, 0>, grid, kAttentionSimtThreads,
                                              AttentionSimtKernel<T, 0>::kSharedBytes, stream, f)
                            : launch_labelled(name, p, plan, attention_simt_kernel<T, 1>, grid, kAttentionSimtThreads,
                                              AttentionSimtKernel<T, 1>::kSharedBytes, stream, f);
  }
  if (!status.ok() || plan.splits == 1) return status;
  return launch_labelled("attention_merge_kernel", p, plan, attention_merge_kernel<T>,
                         dim3(static_cast<unsigned>((f.rows_of_all + 3) / 4)), 128, 0, stream, f, plan.splits);
}

}  // namespace

AttentionProblem attention_problem(const AttentionParams& p) {
  const auto key = [&](int64_t at) { return std::clamp<int64_t>(at, 0, p.key_length); };
  const float factor = static_cast<float>(p.scale * kLog2E<double>);
  const bool general = needs_more_than_a_factor(p) || p.dropout_p > 0 || !(factor > 0) || std::isinf(factor);
  return {p.dtype,
          p.heads,
          std::max<int64_t>(p.group, 1),
          p.query_length,
          p.head_dim,
          p.value_dim,
          key(p.first_shift),
          key(p.query_length + p.last_shift),
          general};
}

AttentionPlan attention_forward_plan(const AttentionParams& p) {
  const Device device = current_device();
  return attention_plan(attention_problem(p), device.capability, device.multiprocessors, device.shared_bytes);
}

int64_t attention_forward_workspace(const AttentionParams& p) {
  return attention_partial_bytes(attention_problem(p), attention_forward_plan(p).splits);
}

Status attention_forward_planned(const AttentionParams& p, const AttentionPlan& plan, const int64_t* philox_seed,
                                 Workspace workspace, Stream stream) {
  if (p.heads == 0 || p.query_length == 0) return {};
  AttentionForward f;
  if (const char* reason = fill(p, plan, f)) return refused("attention", p, plan, reason);
  f.philox_seed_at = reinterpret_cast<const uint64_t*>(philox_seed);
  if (workspace.bytes < attention_partial_bytes(attention_problem(p), plan.splits))
    return refused("attention", p, plan, "a workspace that is too small");
  f.partial = plan.splits > 1 ? workspace.data : nullptr;
  switch (p.dtype) {
    case DType::Float32: return run<float>(p, plan, f, stream);
    case DType::Float64: return run<double>(p, plan, f, stream);
    case DType::BFloat16: return run<BFloat16>(p, plan, f, stream);
    case DType::Float16: return run<Float16>(p, plan, f, stream);
  }
  return {};
}

Status attention_forward(const AttentionParams& p, const int64_t* philox_seed, Workspace workspace, Stream stream) {
  return attention_forward_planned(p, attention_forward_plan(p), philox_seed, workspace, stream);
}

}  // namespace fastnn::cuda

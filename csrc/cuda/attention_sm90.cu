// attention on sm_90a, host side: what TMA can describe, the tensor maps, the launch.
#include "cuda/attention_sm90.cuh"

#include "cuda/attention_fill.h"

namespace fastnn::cuda {
namespace {

// An operand as TMA has it: features, positions, then those digits of a head's number that have a stride.
struct Tensor {
  int64_t sizes[5], strides[5];  // strides in bytes
  HeadAxes axes;
};
bool describe(const AttentionRows& rows, int64_t positions, int64_t features, Tensor& t) {
  if (rows.col_stride != 1 || rows.width != 16 || positions < 1 || features < 1) return false;
  t = {{features, positions, 1, 1, 1}, {2, 2 * rows.row_stride, 16, 16, 16}, {}};
  if (positions > 1 && rows.row_stride <= 0) return false;
  int axis = 2;
  t.axes.digits = rows.heads.digits;
  for (int i = 0; i < rows.heads.digits; ++i) {
    t.axes.size[i] = rows.heads.size[i];
    if (rows.heads.stride[i] == 0) continue;
    if (axis == 5 || rows.heads.stride[i] < 0) return false;
    t.sizes[axis] = rows.heads.size[i], t.strides[axis] = 2 * rows.heads.stride[i];
    t.axes.axis[i] = axis++;
  }
  for (const int64_t stride : t.strides)
    if (stride >= int64_t{1} << 40) return false;
  return true;
}

// Boxes of `positions` rows of 64 features.
bool encode(const AttentionRows& rows, int64_t positions, int64_t features, DType dtype, int box_positions,
            TensorMap& map, HeadAxes& axes) {
  Tensor t;
  if (!describe(rows, positions, features, t)) return false;
  axes = t.axes;
  const int box[] = {64, box_positions, 1, 1, 1};
  return encode_tensor_map(map, dtype, static_cast<const uint16_t*>(rows.data) + rows.heads.first, 5, t.sizes,
                           t.strides, box);
}

// Whether the rows' numbers of keys differ much, as with a causal limit.
bool uneven(const AttentionForward& f) {
  const auto keys = [&](int64_t query) {
    const int64_t end = std::min<int64_t>(f.key_length, query + f.last_shift + 1);
    return std::max<int64_t>(end - std::max<int64_t>(query + f.first_shift, 0), 0);
  };
  const int64_t first = keys(0), last = keys(f.query_length - 1);
  return 8 * std::min(first, last) < 7 * std::max(first, last);
}

template <class T, int TILE = 0>
Status launch_tile(const AttentionParams& p, const AttentionPlan& plan, const AttentionTiled& a, dim3 grid,
                   Stream stream, bool& told) {
  if constexpr (TILE == kAttentionWgmmaTileCount) {
    return {};
  } else {
    if (plan.tile != TILE) return launch_tile<T, TILE + 1>(p, plan, a, grid, stream, told);
    const bool there = has_body(attention_wgmma_kernel<T, TILE>);
    if (!there) {
      told = false;
      return refused("attention_wgmma_kernel", p, plan, "a build without sm_90a");
    }
    return launch_labelled("attention_wgmma_kernel", p, plan, attention_wgmma_kernel<T, TILE>, grid,
                           kAttentionWgmmaThreads, attention_wgmma_shared_bytes(kAttentionWgmmaTiles[TILE]), stream, a);
  }
}

}  // namespace

bool attention_tiled(const AttentionParams& p, const AttentionForward& f) {
  Tensor t;
  return (p.dtype == DType::Float16 || p.dtype == DType::BFloat16) &&
         describe(f.query, p.query_length, p.head_dim, t) && describe(f.key, p.key_length, p.head_dim, t) &&
         describe(f.value, p.key_length, p.value_dim, t);
}

Status attention_sm90_forward(const AttentionParams& p, const AttentionPlan& plan, const AttentionForward& f,
                              Stream stream, bool& told) {
  const Device device = current_device();
  AttentionProblem problem = attention_problem(p);
  problem.tiled = true;
  if (plan.heads != 1 ||
      !attention_wgmma_fits(problem, kAttentionWgmmaTiles[plan.tile], device.capability, device.shared_bytes))
    return refused("attention_wgmma_kernel", p, plan, "a tile that does not fit");
  const AttentionWgmmaTile& tile = kAttentionWgmmaTiles[plan.tile];
  AttentionTiled a;
  told = encode(f.query, p.query_length, p.head_dim, p.dtype, tile.rows, a.query, a.query_heads) &&
         encode(f.key, p.key_length, p.head_dim, p.dtype, tile.keys, a.key, a.key_heads) &&
         encode(f.value, p.key_length, p.value_dim, p.dtype, tile.keys, a.value, a.value_heads);
  if (!told) return refused("attention_wgmma_kernel", p, plan, "operands that TMA cannot describe");
  a.forward = f;
  a.tiles = static_cast<uint32_t>(p.heads * f.row_tiles);
  a.section = static_cast<uint32_t>(
      attention_section(p.heads, f.group, 2 * p.key_length * (p.head_dim + p.value_dim), uneven(f)));
  // A block on every multiprocessor walks along the tiles; where keys are split there are few tiles anyway.
  const uint32_t blocks = plan.splits > 1 ? a.tiles : std::min(a.tiles, static_cast<uint32_t>(device.multiprocessors));
  const dim3 grid(blocks, static_cast<unsigned>(plan.splits));
  return p.dtype == DType::Float16 ? launch_tile<Float16>(p, plan, a, grid, stream, told)
                                   : launch_tile<BFloat16>(p, plan, a, grid, stream, told);
}

}  // namespace fastnn::cuda

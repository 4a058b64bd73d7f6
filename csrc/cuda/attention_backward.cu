// The gradients of attention on CUDA, host side.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_backward_sm80.cuh"
#include "cuda/attention_fill.h"

namespace fastnn::cuda {
namespace {

template <class T, AttentionGrad OF>
Status launch_grad(const AttentionParams& p, const AttentionPlan& plan, AttentionBackward b, const AttentionResult& to,
                   Stream stream) {
  constexpr bool of_query = OF == AttentionGrad::Query, of_value = OF == AttentionGrad::Value;
  using Kernel = AttentionGradKernel<T, OF>;
  const int64_t positions = of_query ? p.query_length : p.key_length, columns = of_value ? p.value_dim : p.head_dim;
  const int64_t items = of_query ? p.heads : p.heads / std::max<int64_t>(p.group, 1);
  if (!to.data || positions == 0 || columns == 0) return {};
  if (!fill_rows(b.grad, to, 1, items, positions, sizeof(T)))
    return refused("attention_backward", p, plan, "leading dimensions that six strides cannot tell");
  const int64_t blocks = items * ((positions + Kernel::kSide - 1) / Kernel::kSide);
  if (blocks > std::numeric_limits<int32_t>::max())
    return refused("attention_backward", p, plan, "more blocks than a grid holds");
  const dim3 grid(static_cast<unsigned>(blocks), 1,
                  static_cast<unsigned>((columns + Kernel::kCols - 1) / Kernel::kCols));
  return launch_labelled("attention_grad_kernel", p, plan, attention_grad_kernel<T, OF>, grid, Kernel::kThreads,
                         Kernel::kSharedBytes, stream, b);
}

// dK and dV together, or dQ.
template <class T, bool OF_KEYS, int TILE = 0>
Status launch_grad_mma(const AttentionBackwardParams& g, int tile, const AttentionPlan& plan, AttentionBackward b,
                       Stream stream) {
  if constexpr (TILE == kAttentionGradTileCount) {
    return {};
  } else {
    if (tile != TILE) return launch_grad_mma<T, OF_KEYS, TILE + 1>(g, tile, plan, b, stream);
    constexpr AttentionGradTile t = kAttentionGradTiles[TILE];
    const AttentionParams& p = g.forward;
    const AttentionResult& to = OF_KEYS ? g.grad_key : g.grad_query;
    const int64_t positions = OF_KEYS ? p.key_length : p.query_length;
    const int64_t items = OF_KEYS ? p.heads / std::max<int64_t>(p.group, 1) : p.heads;
    const bool first = to.data && p.head_dim > 0, second = OF_KEYS && g.grad_value.data && p.value_dim > 0;
    if ((!first && !second) || positions == 0 || items == 0) return {};
    if ((first && !fill_rows(b.grad, to, 1, items, positions, sizeof(T))) ||
        (second && !fill_rows(b.grad_value, g.grad_value, 1, items, positions, sizeof(T))))
      return refused("attention_backward", p, plan, "leading dimensions that six strides cannot tell");
    const int64_t blocks = items * ((positions + t.rows - 1) / t.rows);
    if (blocks > std::numeric_limits<int32_t>::max())
      return refused("attention_backward", p, plan, "more blocks than a grid holds");
    return launch_labelled("attention_grad_mma_kernel", p, plan, attention_grad_mma_kernel<T, TILE, OF_KEYS>,
                           dim3(static_cast<unsigned>(blocks)), attention_grad_threads(t),
                           attention_grad_shared_bytes(t), stream, b);
  }
}

// Fills what the gradient of a mask needs; where its index is not made of digits, false.
bool fill_mask(const AttentionBackwardParams& g, AttentionBackward& b) {
  b.grad_mask = g.grad_mask;
  b.mask_rows = static_cast<int>(g.mask_rows), b.mask_cols = static_cast<int>(g.mask_cols);
  if (!head_offsets(g.mask_index, g.forward.heads, b.mask_index)) return false;
  b.mask_turns = g.forward.heads > 0 ? 1 : 0;
  for (int i = 0; i < b.mask_index.digits; ++i)
    if (b.mask_index.stride[i] == 0) b.mask_turns *= static_cast<int>(b.mask_index.size[i]);
  return true;
}

template <class T>
Status launch_mask(const AttentionBackwardParams& g, const AttentionPlan& plan, AttentionBackward b, Stream stream) {
  const AttentionParams& p = g.forward;
  if (!g.grad_mask || g.mask_heads * g.mask_rows * g.mask_cols == 0) return {};
  if (!fill_mask(g, b))
    return refused("attention_backward", p, plan, "leading dimensions that six strides cannot tell");
  using Kernel = AttentionGradKernel<T, AttentionGrad::Mask>;
  const auto tiles = [](int64_t n) { return n == 1 ? 1 : (n + Kernel::kSide - 1) / Kernel::kSide; };
  const int64_t blocks = g.mask_heads * tiles(g.mask_rows) * tiles(g.mask_cols);
  if (blocks > std::numeric_limits<int32_t>::max())
    return refused("attention_backward", p, plan, "more blocks than a grid holds");
  return launch_labelled("attention_grad_kernel", p, plan, attention_grad_kernel<T, AttentionGrad::Mask>,
                         dim3(static_cast<unsigned>(blocks)), Kernel::kThreads, Kernel::kSharedBytes, stream, b);
}

template <class T>
Status run(const AttentionBackwardParams& g, int tile, const AttentionPlan& plan, const AttentionBackward& b,
           Stream stream) {
  const AttentionParams& p = g.forward;
  Status status;
  if (b.forward.rows_of_all > 0)
    status = launch_labelled("attention_delta_kernel", p, plan, attention_delta_kernel<T>,
                             dim3(static_cast<unsigned>((b.forward.rows_of_all + 3) / 4)), 128, 0, stream, b);
  if constexpr (sizeof(T) == 2)
    if (tile != kNoAttentionGradTile) {
      if (status.ok()) status = launch_grad_mma<T, true>(g, tile, plan, b, stream);
      if (status.ok()) status = launch_grad_mma<T, false>(g, tile, plan, b, stream);
      if (status.ok()) status = launch_mask<T>(g, plan, b, stream);
      return status;
    }
  if (status.ok()) status = launch_grad<T, AttentionGrad::Value>(p, plan, b, g.grad_value, stream);
  if (status.ok()) status = launch_grad<T, AttentionGrad::Key>(p, plan, b, g.grad_key, stream);
  if (status.ok()) status = launch_grad<T, AttentionGrad::Query>(p, plan, b, g.grad_query, stream);
  if (status.ok()) status = launch_mask<T>(g, plan, b, stream);
  return status;
}

}  // namespace

Status attention_backward_planned(const AttentionBackwardParams& g, int tile, const int64_t* philox_seed,
                                  const Workspace& workspace, Stream stream) {
  const AttentionParams& p = g.forward;
  const AttentionPlan plan = {AttentionKernel::Simt, 0, 1, 1, 1, 0};
  const Device device = current_device();
  if (tile != kNoAttentionGradTile && !attention_grad_fits(p.dtype, p.head_dim, p.value_dim, kAttentionGradTiles[tile],
                                                           device.capability, device.shared_bytes))
    return refused("attention_grad_mma_kernel", p, plan, "a tile that does not fit");
  AttentionBackward b = {};
  if (const char* reason = fill(p, philox_seed, b.forward)) return refused("attention_backward", p, plan, reason);
  const int64_t size = size_of(p.dtype);
  if (!fill_rows(b.grad_output, g.grad_output, p.value_dim > 1 ? g.grad_output.col_stride : 1, p.heads, p.query_length,
                 size))
    return refused("attention_backward", p, plan, "leading dimensions that six strides cannot tell");
  b.grad_lse = g.grad_lse, b.delta = workspace(b.forward.rows_of_all * (p.dtype == DType::Float64 ? 8 : 4));
  b.grad_scale = p.head_dim == 0 ? 1.0 : p.scale;
  switch (p.dtype) {
    case DType::Float32: return run<float>(g, tile, plan, b, stream);
    case DType::Float64: return run<double>(g, tile, plan, b, stream);
    case DType::BFloat16: return run<BFloat16>(g, tile, plan, b, stream);
    case DType::Float16: return run<Float16>(g, tile, plan, b, stream);
  }
  return {};
}

Status attention_backward(const AttentionBackwardParams& g, const int64_t* philox_seed, const Workspace& workspace,
                          Stream stream) {
  const AttentionParams& p = g.forward;
  const Device device = current_device();
  const int tile = attention_grad_tile(p.dtype, p.head_dim, p.value_dim, device.capability, device.shared_bytes);
  return attention_backward_planned(g, tile, philox_seed, workspace, stream);
}

}  // namespace fastnn::cuda

// attention on CUDA, host side: the plan, the kernel that it names, the launch.
#include "cuda/attention_fill.h"
#include "cuda/attention_launch.h"
#include "cuda/attention_simt.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/launch.cuh"

namespace fastnn::cuda {
namespace {

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
Status run(const AttentionParams& p, const AttentionPlan& plan, const AttentionForward& f, Stream stream, bool& told) {
  const Device device = current_device();
  const int64_t blocks = p.heads / plan.heads * f.row_tiles;
  if (blocks > std::numeric_limits<int32_t>::max())
    return refused("attention", p, plan, "more blocks than a grid holds");
  dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.splits));
  Status status;
  if (plan.kernel == AttentionKernel::Wgmma) {
    status = attention_sm90_forward(p, plan, f, stream, told);
  } else if (plan.kernel == AttentionKernel::Mma) {
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

// `told`: false where the plan's kernel wants tensor maps and there are none.
Status launch_planned(const AttentionParams& p, const AttentionPlan& plan, AttentionForward f,
                      const Workspace& workspace, Stream stream, bool& told) {
  fill_plan(plan, f);
  f.partial = workspace(attention_partial_bytes(attention_problem(p), plan.splits));
  switch (p.dtype) {
    case DType::Float32: return run<float>(p, plan, f, stream, told);
    case DType::Float64: return run<double>(p, plan, f, stream, told);
    case DType::BFloat16: return run<BFloat16>(p, plan, f, stream, told);
    case DType::Float16: return run<Float16>(p, plan, f, stream, told);
  }
  return {};
}

// The plan of the current device; `tiled`: TMA may serve.
AttentionPlan plan_of(const AttentionParams& p, const AttentionForward& f, bool tiled) {
  const Device device = current_device();
  AttentionProblem problem = attention_problem(p);
  problem.tiled = tiled && device.capability == 90 && !problem.general && attention_tiled(p, f);
  return attention_plan(problem, device.capability, device.multiprocessors, device.shared_bytes);
}

bool nothing_to_do(const AttentionParams& p) { return p.heads == 0 || p.query_length == 0; }

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
  AttentionForward f;
  return plan_of(p, f, fill(p, nullptr, f) == nullptr);
}

Status attention_forward_planned(const AttentionParams& p, const AttentionPlan& plan, const int64_t* philox_seed,
                                 const Workspace& workspace, Stream stream) {
  if (nothing_to_do(p)) return {};
  AttentionForward f;
  if (const char* reason = fill(p, philox_seed, f)) return refused("attention", p, plan, reason);
  bool told = true;
  return launch_planned(p, plan, f, workspace, stream, told);
}

Status attention_forward(const AttentionParams& p, const int64_t* philox_seed, const Workspace& workspace,
                         Stream stream) {
  if (nothing_to_do(p)) return {};
  AttentionForward f;
  if (const char* reason = fill(p, philox_seed, f)) return refused("attention", p, {}, reason);
  bool told = true;
  const Status status = launch_planned(p, plan_of(p, f, true), f, workspace, stream, told);
  return told ? status : launch_planned(p, plan_of(p, f, false), f, workspace, stream, told);
}

}  // namespace fastnn::cuda

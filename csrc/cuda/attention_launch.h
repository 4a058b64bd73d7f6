// attention with the plan given, as tests call it to force every kernel, tile and number of splits.
#pragma once

#include "cuda/attention_plan.h"
#include "fastnn/attention.h"

namespace fastnn::cuda {

AttentionProblem attention_problem(const AttentionParams& p);
// The plan of the current device.
AttentionPlan attention_forward_plan(const AttentionParams& p);
Status attention_forward_planned(const AttentionParams& p, const AttentionPlan& plan, const int64_t* philox_seed,
                                 const Workspace& workspace, Stream stream);
// tile: into kAttentionGradTiles, or kNoAttentionGradTile.
Status attention_backward_planned(const AttentionBackwardParams& p, int tile, const int64_t* philox_seed,
                                  const Workspace& workspace, Stream stream);

// attention_sm90.cu: whether TMA can tell where query, key and value lie; and the launch of plan.kernel Wgmma. `told` is
// false where the driver makes no tensor map or the build has no kernel for sm_90a: nothing was launched then.
struct AttentionForward;
bool attention_tiled(const AttentionParams& p, const AttentionForward& f);
Status attention_sm90_forward(const AttentionParams& p, const AttentionPlan& plan, const AttentionForward& f,
                              Stream stream, bool& told);

}  // namespace fastnn::cuda

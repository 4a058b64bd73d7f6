// linear with the plan given, as tests call it to force every kernel, tile and number of splits.
#pragma once

#include "cuda/linear_plan.h"
#include "fastnn/linear.h"

namespace fastnn::cuda {

// The plan of the current device.
LinearPlan linear_forward_plan(const LinearForward& p);
Status linear_forward_planned(const LinearForward& p, const LinearPlan& plan, const Workspace& workspace,
                              Stream stream);

}  // namespace fastnn::cuda

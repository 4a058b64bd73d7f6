// linear on wgmma, what linear.cu calls: a translation unit of its own, since sm_90a alone has a body for it.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/linear_simt.cuh"

namespace fastnn::cuda {

// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias) of 16-bit types, as the plan says.
struct LinearWgmmaCall {
  DType dtype;
  int64_t K;
  StridedMatrix a, b;
  LinearEpilogue epilogue;
};

// Whether TMA can describe an operand: one of its directions is dense, the lines of it start on 16 bytes.
inline bool linear_tma_takes(const StridedMatrix& x) {
  const bool along_k = x.col == 1 || x.cols <= 1;
  if (!along_k && x.row != 1 && x.rows > 1) return false;
  const int64_t lines = along_k ? x.rows : x.cols, ld = along_k ? x.row : x.col;
  constexpr int64_t kMost = int64_t{1} << 31;  // coordinates are of 32 bits
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.rows > 0 && x.cols > 0 && x.rows < kMost &&
         x.cols < kMost && (lines == 1 || (ld > 0 && ld % 8 == 0 && ld < int64_t{1} << 39));
}

// False where the driver gives no tensor map or the build has no sm_90a: nothing was launched then.
bool launch_linear_wgmma(const Label& label, const LinearWgmmaCall& call, const LinearPlan& plan, Stream stream,
                         Status& status);

}  // namespace fastnn::cuda

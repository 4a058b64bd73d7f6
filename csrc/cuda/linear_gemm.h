// The product that every kernel of linear makes, as the host side of them has it, and what its layouts allow.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/linear_epilogue.cuh"
#include "cuda/linear_plan.h"
#include "cuda/linear_simt.cuh"

namespace fastnn::cuda {

// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias), element (m, k) of A at m * row + k * col.
struct Gemm {
  DType dtype;
  int64_t M, N, K;
  StridedMatrix a, b;
  LinearEpilogue epilogue;
  bool allow_tf32;
};

inline bool along_k(const StridedMatrix& x) { return x.col == 1 || x.cols <= 1; }
inline bool along_rows(const StridedMatrix& x) { return x.row == 1 || x.rows <= 1; }

// f(whether A lies along K, whether B does), as types that a kernel's template takes.
template <class F>
auto with_layouts(const Gemm& g, const F& f) {
  const std::true_type yes;
  const std::false_type no;
  if (along_k(g.a)) return along_k(g.b) ? f(yes, yes) : f(yes, no);
  return along_k(g.b) ? f(no, yes) : f(no, no);
}

// Whether TMA can describe an operand: one of its directions is dense, the lines of it start on 16 bytes.
inline bool tma_takes(const StridedMatrix& x) {
  const bool k = along_k(x);
  if (!k && !along_rows(x)) return false;
  const int64_t lines = k ? x.rows : x.cols, ld = k ? x.row : x.col;
  constexpr int64_t kMost = int64_t{1} << 31;  // coordinates are of 32 bits
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.rows > 0 && x.cols > 0 && x.rows < kMost &&
         x.cols < kMost && (lines == 1 || (ld > 0 && ld % 8 == 0 && ld < int64_t{1} << 39));
}

// linear_sm90.cu, a translation unit of its own since sm_90a alone has a body for its kernel. False where TMA cannot
// describe the operands, the driver gives no tensor map or the build has no sm_90a: nothing was launched then.
bool launch_wgmma(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream, Status& status);

}  // namespace fastnn::cuda

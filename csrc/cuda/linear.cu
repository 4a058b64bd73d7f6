// linear on CUDA, host side: the plan, the kernel that it names, the launch.
#include "cuda/launch.cuh"
#include "cuda/linear_gemv.cuh"
#include "cuda/linear_launch.h"
#include "cuda/linear_simt.cuh"
#include "cuda/linear_sm80.cuh"

namespace fastnn::cuda {
namespace {

// C[M, N] = f(A[M, K] · B[N, K]ᵀ + bias), element (m, k) of A at m * row + k * col.
struct Gemm {
  DType dtype;
  int64_t M, N, K;
  StridedMatrix a, b;
  LinearEpilogue epilogue;
};

bool along_k(const StridedMatrix& x) { return x.col == 1 || x.cols <= 1; }
bool along_rows(const StridedMatrix& x) { return x.row == 1 || x.rows <= 1; }

LinearPlan plan_of(const Gemm& g) {
  const LinearProblem problem = {g.dtype,
                                 g.M,
                                 g.N,
                                 g.K,
                                 along_k(g.a) || along_rows(g.a),
                                 along_k(g.b) || along_rows(g.b),
                                 along_k(g.a) && along_k(g.b)};
  const Device device = current_device();
  return linear_plan(problem, device.capability, device.multiprocessors);
}

template <class F>
Status with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32: return f(float{});
    case DType::Float64: return f(double{});
    case DType::BFloat16: return f(BFloat16{});
    case DType::Float16: return f(Float16{});
  }
  return {};
}

// ---- one kernel each -------------------------------------------------------------------------------------------------

RowMatrix row_matrix(const StridedMatrix& x) {
  RowMatrix matrix;
  matrix.data = static_cast<const uint16_t*>(x.data);
  const bool k = along_k(x);
  matrix.ld = k ? x.row : x.col, matrix.rows = k ? x.rows : x.cols, matrix.cols = k ? x.cols : x.rows;
  matrix.width = copy_width(reinterpret_cast<uintptr_t>(x.data), matrix.ld, matrix.rows);
  return matrix;
}

dim3 grid_of(const Gemm& g, const LinearPlan& plan) {
  const LinearTile t = linear_tile(plan.kernel, plan.tile);
  return dim3(static_cast<unsigned>(ceil_div(g.M, t.m) * ceil_div(g.N, t.n)), static_cast<unsigned>(plan.splits));
}

template <class T, int TILE>
Status launch_mma(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream) {
  constexpr LinearTile t = kMmaTiles[TILE];
  const LinearMma params = {row_matrix(g.a),    row_matrix(g.b),    g.K,       plan.k_per_split,
                            ceil_div(g.M, t.m), ceil_div(g.N, t.n), g.epilogue};
  const auto go = [&](auto a, auto b) {
    constexpr bool A = decltype(a)::value, B = decltype(b)::value;
    return launch(label, linear_mma_kernel<T, TILE, A, B>, grid_of(g, plan), t.threads,
                  LinearMmaKernel<T, TILE, A, B>::kSharedBytes, stream, params);
  };
  const std::true_type yes;
  const std::false_type no;
  if (along_k(g.a)) return along_k(g.b) ? go(yes, yes) : go(yes, no);
  return along_k(g.b) ? go(no, yes) : go(no, no);
}

template <class T, int TILE>
Status launch_simt(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream) {
  constexpr LinearTile t = kSimtTiles[TILE];
  const LinearSimt params = {g.a, g.b, plan.k_per_split, ceil_div(g.M, t.m), ceil_div(g.N, t.n), g.epilogue};
  return launch(label, linear_simt_kernel<T, TILE>, grid_of(g, plan), t.threads,
                LinearSimtKernel<T, TILE>::kSharedBytes, stream, params);
}

template <class T>
Status launch_gemv(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream) {
  const auto rows_aligned = [](const StridedMatrix& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.rows <= 1 || x.row % kLanes<T> == 0);
  };
  const bool vector = rows_aligned(g.a) && rows_aligned(g.b);
  const LinearGemv p = {g.a.data, g.a.row, g.b.data, g.b.row, g.K, plan.k_per_split, vector, g.epilogue};
  const dim3 grid(static_cast<unsigned>(ceil_div(g.N, 16)), static_cast<unsigned>(plan.splits));
  constexpr int shared = 4 * 8 * 16 * sizeof(Compute<T>);
  if constexpr (sizeof(T) == 2)
    return launch(label, linear_gemv_mma_kernel<T>, grid, 128, shared, stream, p);
  else
    return g.M == 1 ? launch(label, linear_gemv_fma_kernel<T, 1>, grid, 128, shared, stream, p)
                    : launch(label, linear_gemv_fma_kernel<T, 8>, grid, 128, shared, stream, p);
}

template <class T>
Status run(const Gemm& g, const LinearPlan& plan, Stream stream) {
  const Label label = {plan.kernel == LinearKernel::Mma    ? "linear_mma_kernel"
                       : plan.kernel == LinearKernel::Simt ? "linear_simt_kernel"
                                                           : "linear_gemv_kernel",
                       {{"M", g.M}, {"N", g.N}, {"K", g.K}, {"bytes", sizeof(T)}, {"tile", plan.tile}}};
  switch (plan.kernel) {
    case LinearKernel::Gemv: return launch_gemv<T>(label, g, plan, stream);
    case LinearKernel::Mma:
      if constexpr (sizeof(T) == 2)
        return plan.tile == 0 ? launch_mma<T, 0>(label, g, plan, stream) : launch_mma<T, 1>(label, g, plan, stream);
      return failed(label, cudaErrorInvalidValue, "no such kernel in this dtype");
    case LinearKernel::Simt:
      if constexpr (std::is_same_v<T, float>)
        if (plan.tile == 0) return launch_simt<T, 0>(label, g, plan, stream);
      return launch_simt<T, 1>(label, g, plan, stream);
  }
  return {};
}

Status gemm(Gemm g, const LinearPlan& plan, Workspace workspace, Stream stream) {
  if (g.M == 0 || g.N == 0) return {};
  const Label label = {"linear", {{"M", g.M}, {"N", g.N}, {"K", g.K}}};
  const int64_t bytes = linear_partial_bytes(g.dtype, g.M, g.N, plan.splits);
  if (workspace.bytes < bytes) return failed(label, cudaErrorInvalidValue, "a workspace that is too small");
  LinearEpilogue& e = g.epilogue;
  e.partial = plan.splits > 1 ? workspace.data : nullptr;
  const int64_t size = g.dtype == DType::Float64 ? 8 : g.dtype == DType::Float32 ? 4 : 2;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(e.output) | reinterpret_cast<uintptr_t>(e.preactivation);
  e.vector = addresses % 16 == 0 && g.N * size % 16 == 0;
  return with_storage(g.dtype, [&](auto t) {
    using T = decltype(t);
    Status status = run<T>(g, plan, stream);
    if (!status.ok() || !e.partial) return status;
    const Label reduce = {"linear_reduce_kernel", {{"M", g.M}, {"N", g.N}, {"splits", plan.splits}}};
    return launch(reduce, linear_reduce_kernel<T>, dim3(static_cast<unsigned>(ceil_div(g.M * g.N, 256))), 256, 0,
                  stream, e, plan.splits);
  });
}

Gemm forward_gemm(const LinearForward& p) {
  return {p.dtype,
          p.M,
          p.N,
          p.K,
          {p.input, p.input_row, p.input_col, p.M, p.K},
          {p.weight, p.weight_row, p.weight_col, p.N, p.K},
          {p.output, p.preactivation, p.bias, nullptr, p.M, p.N, p.activation, false}};
}

}  // namespace

LinearPlan linear_forward_plan(const LinearForward& p) { return plan_of(forward_gemm(p)); }

int64_t linear_forward_workspace(const LinearForward& p) {
  return linear_partial_bytes(p.dtype, p.M, p.N, linear_forward_plan(p).splits);
}

Status linear_forward_planned(const LinearForward& p, const LinearPlan& plan, Workspace workspace, Stream stream) {
  return gemm(forward_gemm(p), plan, workspace, stream);
}

Status linear_forward(const LinearForward& p, Workspace workspace, Stream stream) {
  return linear_forward_planned(p, linear_forward_plan(p), workspace, stream);
}

}  // namespace fastnn::cuda

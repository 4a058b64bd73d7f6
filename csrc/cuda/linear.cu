// linear on CUDA, host side: the plan, the kernel that it names, the launch.
#include <algorithm>

#include "cuda/linear_backward.cuh"
#include "cuda/linear_gemm.h"
#include "cuda/linear_gemv.cuh"
#include "cuda/linear_launch.h"
#include "cuda/linear_sm80.cuh"
#include "cuda/linear_tf32.cuh"
#include "cuda/linear_thin.cuh"

namespace fastnn::cuda {
namespace {

LinearPlan plan_of(const Gemm& g) {
  const LinearProblem problem = {g.dtype,
                                 g.M,
                                 g.N,
                                 g.K,
                                 along_k(g.a) || along_rows(g.a),
                                 along_k(g.b) || along_rows(g.b),
                                 along_k(g.a) && along_k(g.b),
                                 g.allow_tf32,
                                 along_k(g.a),
                                 tma_takes(g.a) && tma_takes(g.b)};
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

// ---- one kernel each ------------------------------------------------------------------------------------------------

// Of elements of `size` bytes, 2 or 4.
RowMatrix row_matrix(const StridedMatrix& x, int size) {
  RowMatrix matrix;
  matrix.data = static_cast<const uint16_t*>(x.data);
  const bool k = along_k(x);
  matrix.ld = k ? x.row : x.col, matrix.rows = k ? x.rows : x.cols, matrix.cols = k ? x.cols : x.rows;
  if (matrix.rows <= 1) matrix.ld = 0;  // it has no meaning, and rows past the end take it for an address, too
  matrix.ld *= size / 2, matrix.cols *= size / 2;
  matrix.width = copy_width(reinterpret_cast<uintptr_t>(x.data), matrix.ld);
  return matrix;
}

dim3 grid_of(const Gemm& g, const LinearPlan& plan) {
  const LinearTile t = linear_tile(plan.kernel, plan.tile);
  return dim3(static_cast<unsigned>(ceil_div(g.M, t.m) * ceil_div(g.N, t.n)), static_cast<unsigned>(plan.splits));
}

template <class T, int TILE>
Status launch_mma(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream) {
  constexpr LinearTile t = kMmaTiles[TILE];
  const LinearMma params = {row_matrix(g.a, 2), row_matrix(g.b, 2), g.K,       plan.k_per_split,
                            ceil_div(g.M, t.m), ceil_div(g.N, t.n), g.epilogue};
  return with_layouts(g, [&](auto a, auto b) {
    constexpr bool A = decltype(a)::value, B = decltype(b)::value;
    return launch(label, linear_mma_kernel<T, TILE, A, B>, grid_of(g, plan), t.threads,
                  LinearMmaKernel<T, TILE, A, B>::kSharedBytes, stream, params);
  });
}

template <int TILE, bool THREE>
Status launch_tf32(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream) {
  constexpr LinearTile t = kTf32Tiles[TILE];
  const LinearMma params = {row_matrix(g.a, 4), row_matrix(g.b, 4), g.K,       plan.k_per_split,
                            ceil_div(g.M, t.m), ceil_div(g.N, t.n), g.epilogue};
  return with_layouts(g, [&](auto a, auto b) {
    constexpr bool A = decltype(a)::value, B = decltype(b)::value;
    return launch(label, linear_tf32_kernel<TILE, A, B, THREE>, grid_of(g, plan), t.threads,
                  LinearTf32Kernel<TILE, A, B, THREE>::kSharedBytes, stream, params);
  });
}

template <class T, int TILE>
Status launch_thin(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream) {
  constexpr LinearTile t = kThinTiles[TILE];
  const LinearMma params = {row_matrix(g.a, 2), row_matrix(g.b, 2), g.K,       plan.k_per_split,
                            ceil_div(g.M, t.m), ceil_div(g.N, t.n), g.epilogue};
  const auto go = [&](auto b) {
    constexpr bool B = decltype(b)::value;
    return launch(label, linear_thin_kernel<T, TILE, B>, grid_of(g, plan), t.threads,
                  LinearThinKernel<T, TILE, B>::kSharedBytes, stream, params);
  };
  if (!along_k(g.a)) return failed(label, cudaErrorInvalidValue, "rows that are not dense");
  return along_k(g.b) ? go(std::true_type()) : go(std::false_type());
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
  const Label label = {plan.kernel == LinearKernel::Mma     ? "linear_mma_kernel"
                       : plan.kernel == LinearKernel::Wgmma ? "linear_wgmma_kernel"
                       : plan.kernel == LinearKernel::Simt  ? "linear_simt_kernel"
                       : plan.kernel == LinearKernel::Gemv  ? "linear_gemv_kernel"
                       : plan.kernel == LinearKernel::Thin  ? "linear_thin_kernel"
                                                            : "linear_tf32_kernel",
                       {{"M", g.M}, {"N", g.N}, {"K", g.K}, {"bytes", sizeof(T)}, {"tile", plan.tile}}};
  switch (plan.kernel) {
    case LinearKernel::Gemv: return launch_gemv<T>(label, g, plan, stream);
    case LinearKernel::Wgmma:
      if constexpr (sizeof(T) == 2) {
        Status status;
        if (launch_wgmma(label, g, plan, stream, status)) return status;
        return run<T>(g, {LinearKernel::Mma, 0, plan.splits, plan.k_per_split}, stream);  // splits stay as they are
      }
      return failed(label, cudaErrorInvalidValue, "no such kernel in this dtype");
    case LinearKernel::Mma:
      if constexpr (sizeof(T) == 2)
        return plan.tile == 0 ? launch_mma<T, 0>(label, g, plan, stream) : launch_mma<T, 1>(label, g, plan, stream);
      return failed(label, cudaErrorInvalidValue, "no such kernel in this dtype");
    case LinearKernel::Thin:
      if constexpr (sizeof(T) == 2)
        return plan.tile == 0   ? launch_thin<T, 0>(label, g, plan, stream)
               : plan.tile == 1 ? launch_thin<T, 1>(label, g, plan, stream)
                                : launch_thin<T, 2>(label, g, plan, stream);
      return failed(label, cudaErrorInvalidValue, "no such kernel in this dtype");
    case LinearKernel::Tf32:
      if constexpr (std::is_same_v<T, float>)
        return plan.tile == 0 ? launch_tf32<0, false>(label, g, plan, stream)
                              : launch_tf32<1, false>(label, g, plan, stream);
      return failed(label, cudaErrorInvalidValue, "no such kernel in this dtype");
    case LinearKernel::Tf32x3:
      if constexpr (std::is_same_v<T, float>)
        return plan.tile == 0 ? launch_tf32<0, true>(label, g, plan, stream)
                              : launch_tf32<1, true>(label, g, plan, stream);
      return failed(label, cudaErrorInvalidValue, "no such kernel in this dtype");
    case LinearKernel::Simt:
      if constexpr (std::is_same_v<T, float>)
        if (plan.tile == 0) return launch_simt<T, 0>(label, g, plan, stream);
      return launch_simt<T, 1>(label, g, plan, stream);
  }
  return {};
}

int64_t partial_bytes(const Gemm& g, const LinearPlan& plan) {
  return linear_partial_bytes(g.dtype, g.M, g.N, plan.splits);
}

// `partial`: partial_bytes for the sums of splits.
Status gemm(Gemm g, const LinearPlan& plan, void* partial, Stream stream) {
  if (g.M == 0 || g.N == 0) return {};
  LinearEpilogue& e = g.epilogue;
  e.partial = plan.splits > 1 ? partial : nullptr;
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
          {p.output, p.preactivation, p.bias, nullptr, p.M, p.N, p.activation, false},
          p.allow_tf32};
}

}  // namespace

LinearPlan linear_forward_plan(const LinearForward& p) { return plan_of(forward_gemm(p)); }

Status linear_forward_planned(const LinearForward& p, const LinearPlan& plan, const Workspace& workspace,
                              Stream stream) {
  const Gemm g = forward_gemm(p);
  return gemm(g, plan, workspace(partial_bytes(g, plan)), stream);
}

Status linear_forward(const LinearForward& p, const Workspace& workspace, Stream stream) {
  return linear_forward_planned(p, linear_forward_plan(p), workspace, stream);
}

// ---- backward -------------------------------------------------------------------------------------------------------

namespace {

struct BackwardPlan {
  bool derived;        // grad_output goes through a pass of its own: an activation, or strides that no kernel takes
  int64_t run, runs;   // of rows, for the column sums
  Gemm input, weight;  // grad_input and grad_weight
  LinearPlan input_plan, weight_plan;
  int64_t grad_bytes, sums_bytes, partial_bytes;  // of the workspace, in this order
};

// g W and gᵀ X, where g is grad_output itself or, if it is derived, still to get an address.
BackwardPlan backward_plan(const LinearBackward& p) {
  BackwardPlan b = {};
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  const int64_t size = p.dtype == DType::Float64 ? 8 : p.dtype == DType::Float32 ? 4 : 2, sum = size == 8 ? 8 : 4;
  const bool dense = p.grad_col == 1 || p.grad_row == 1 || p.M <= 1 || p.N <= 1;
  b.derived = (p.grad_input || p.grad_weight) && (p.activation != Activation::None || (size == 2 && !dense));
  b.run = ceil_div(ceil_div(p.M, 256), 64) * 64, b.runs = p.M == 0 ? 0 : ceil_div(p.M, b.run);
  b.grad_bytes = b.derived ? aligned(p.M * p.N * size) : 0;
  b.sums_bytes = p.grad_bias ? aligned(b.runs * p.N * sum) : 0;
  const void* const g = b.derived ? nullptr : p.grad_output;
  const int64_t row = b.derived ? p.N : p.grad_row, col = b.derived ? 1 : p.grad_col;
  const auto product = [&](int64_t M, int64_t N, int64_t K, StridedMatrix a, StridedMatrix other, void* output) {
    const LinearEpilogue epilogue = {output, nullptr, nullptr, nullptr, M, N, Activation::None, false};
    return Gemm{p.dtype, M, N, K, a, other, epilogue, p.allow_tf32};
  };
  const auto plan = [&](const Gemm& gemm, LinearPlan& chosen) {
    if (!gemm.epilogue.output) return;
    chosen = plan_of(gemm);
    b.partial_bytes = std::max(b.partial_bytes, partial_bytes(gemm, chosen));
  };
  b.input =
      product(p.M, p.K, p.N, {g, row, col, p.M, p.N}, {p.weight, p.weight_col, p.weight_row, p.K, p.N}, p.grad_input);
  b.weight =
      product(p.N, p.K, p.M, {g, col, row, p.N, p.M}, {p.input, p.input_col, p.input_row, p.K, p.M}, p.grad_weight);
  plan(b.input, b.input_plan), plan(b.weight, b.weight_plan);
  return b;
}

template <class T>
Status launch_grad(const LinearBackward& p, const BackwardPlan& b, void* grad, void* sums, Stream stream) {
  const Label label = {"linear_grad_kernel", {{"M", p.M}, {"N", p.N}, {"bytes", sizeof(T)}}};
  const bool with_saved = p.activation != Activation::None;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.grad_output) | reinterpret_cast<uintptr_t>(p.saved) |
                              reinterpret_cast<uintptr_t>(grad);
  const bool vector = p.grad_col == 1 && addresses % 16 == 0 && p.N % kLanes<T> == 0 && p.grad_row % kLanes<T> == 0;
  const LinearGrad params = {p.grad_output, p.grad_row,   p.grad_col, with_saved ? p.saved : nullptr,
                             grad,          sums,         p.M,        p.N,
                             b.run,         p.activation, vector};
  if (b.runs > 0 && p.N > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.N, kGradColumns<T>)), static_cast<unsigned>(b.runs));
    const int shared = sums ? 8 * kGradColumns<T> * static_cast<int>(sizeof(Compute<T>)) : 0;
    const Status status = launch(label, linear_grad_kernel<T>, grid, 256, shared, stream, params);
    if (!status.ok()) return status;
  }
  if (!p.grad_bias || p.N == 0) return {};
  return launch({"linear_column_sums_kernel", {{"N", p.N}, {"runs", b.runs}}}, linear_column_sums_kernel<T>,
                dim3(static_cast<unsigned>(ceil_div(p.N, 256))), 256, 0, stream, static_cast<const Compute<T>*>(sums),
                static_cast<T*>(p.grad_bias), p.N, b.runs);
}

}  // namespace

Status linear_backward(const LinearBackward& p, const Workspace& workspace, Stream stream) {
  BackwardPlan b = backward_plan(p);
  char* const memory = static_cast<char*>(workspace(b.grad_bytes + b.sums_bytes + b.partial_bytes));
  void* const grad = b.derived ? memory : nullptr;
  void* const sums = p.grad_bias ? memory + b.grad_bytes : nullptr;
  void* const partial = memory + b.grad_bytes + b.sums_bytes;
  if (b.derived) b.input.a.data = b.weight.a.data = grad;
  if (b.derived || p.grad_bias) {  // of no rows at all, the bias gradient is zero
    const Status status =
        with_storage(p.dtype, [&](auto t) { return launch_grad<decltype(t)>(p, b, grad, sums, stream); });
    if (!status.ok()) return status;
  }
  if (p.grad_input) {
    const Status status = gemm(b.input, b.input_plan, partial, stream);
    if (!status.ok()) return status;
  }
  return p.grad_weight ? gemm(b.weight, b.weight_plan, partial, stream) : Status{};
}

}  // namespace fastnn::cuda

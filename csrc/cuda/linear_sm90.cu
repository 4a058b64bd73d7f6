// linear on wgmma, host side: tensor maps and the launch.
#include "cuda/linear_sm90.cuh"

#include <algorithm>

#include "cuda/linear_gemm.h"

namespace fastnn::cuda {
namespace {

// `side` elements of M or N in a tile.
bool encode(TensorMap& map, DType dtype, const StridedMatrix& x, int side) {
  const bool k = along_k(x);
  const int64_t sizes[2] = {k ? x.cols : x.rows, k ? x.rows : x.cols};
  const int64_t strides[2] = {2, 2 * (k ? x.row : x.col)};
  const int box[2] = {64, k ? side : 64};
  return encode_tensor_map(map, dtype, x.data, 2, sizes, strides, box);
}

template <class T, int TILE>
bool launch_tile(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream, Status& status) {
  constexpr LinearTile t = kWgmmaTiles[TILE];
  LinearWgmma params = {};
  if (!encode(params.a, g.dtype, g.a, t.m) || !encode(params.b, g.dtype, g.b, t.n)) return false;
  params.K = g.K, params.k_per_split = plan.k_per_split;
  params.tiles_m = ceil_div(g.M, t.m), params.tiles_n = ceil_div(g.N, t.n);
  params.work = params.tiles_m * params.tiles_n * plan.splits;
  params.epilogue = g.epilogue;
  const int64_t blocks = std::min<int64_t>(params.work, current_device().multiprocessors);
  return with_layouts(g, [&](auto a, auto b) {
    constexpr bool A = decltype(a)::value, B = decltype(b)::value;
    if (!has_body(linear_wgmma_kernel<T, TILE, A, B>)) return false;
    status = launch(label, linear_wgmma_kernel<T, TILE, A, B>, dim3(static_cast<unsigned>(blocks)), t.threads,
                    LinearWgmmaKernel<T, TILE, A, B>::kSharedBytes, stream, params);
    return true;
  });
}

}  // namespace

bool launch_wgmma(const Label& label, const Gemm& g, const LinearPlan& plan, Stream stream, Status& status) {
  if (!tma_takes(g.a) || !tma_takes(g.b)) return false;
  if (g.dtype == DType::Float16)
    return plan.tile == 0 ? launch_tile<Float16, 0>(label, g, plan, stream, status)
                          : launch_tile<Float16, 1>(label, g, plan, stream, status);
  return plan.tile == 0 ? launch_tile<BFloat16, 0>(label, g, plan, stream, status)
                        : launch_tile<BFloat16, 1>(label, g, plan, stream, status);
}

}  // namespace fastnn::cuda

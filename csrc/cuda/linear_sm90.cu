// linear on wgmma, host side: tensor maps and the launch.
#include "cuda/linear_sm90.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/linear_sm90.h"

namespace fastnn::cuda {
namespace {

bool along_k(const StridedMatrix& x) { return x.col == 1 || x.cols <= 1; }

// `side` elements of M or N in a tile.
bool encode(TensorMap& map, DType dtype, const StridedMatrix& x, int side) {
  const bool k = along_k(x);
  const int64_t sizes[2] = {k ? x.cols : x.rows, k ? x.rows : x.cols};
  const int64_t strides[2] = {2, 2 * (k ? x.row : x.col)};
  const int box[2] = {64, k ? side : 64};
  return encode_tensor_map(map, dtype, x.data, 2, sizes, strides, box);
}

template <class T, int TILE>
bool launch_tile(const Label& label, const LinearWgmmaCall& call, const LinearPlan& plan, Stream stream,
                 Status& status) {
  constexpr LinearTile t = kWgmmaTiles[TILE];
  const LinearEpilogue& e = call.epilogue;
  LinearWgmma params = {};
  if (!encode(params.a, call.dtype, call.a, t.m) || !encode(params.b, call.dtype, call.b, t.n)) return false;
  params.K = call.K, params.k_per_split = plan.k_per_split;
  params.tiles_m = ceil_div(e.M, t.m), params.tiles_n = ceil_div(e.N, t.n);
  params.work = params.tiles_m * params.tiles_n * plan.splits;
  params.epilogue = e;
  const int64_t blocks = std::min<int64_t>(params.work, current_device().multiprocessors);
  const auto go = [&](auto a, auto b) {
    constexpr bool A = decltype(a)::value, B = decltype(b)::value;
    const bool there = has_body(linear_wgmma_kernel<T, TILE, A, B>);
    if (!there) return false;
    status = launch(label, linear_wgmma_kernel<T, TILE, A, B>, dim3(static_cast<unsigned>(blocks)), t.threads,
                    LinearWgmmaKernel<T, TILE, A, B>::kSharedBytes, stream, params);
    return true;
  };
  const std::true_type yes;
  const std::false_type no;
  if (along_k(call.a)) return along_k(call.b) ? go(yes, yes) : go(yes, no);
  return along_k(call.b) ? go(no, yes) : go(no, no);
}

}  // namespace

bool launch_linear_wgmma(const Label& label, const LinearWgmmaCall& call, const LinearPlan& plan, Stream stream,
                         Status& status) {
  if (!linear_tma_takes(call.a) || !linear_tma_takes(call.b)) return false;
  if (call.dtype == DType::Float16)
    return plan.tile == 0 ? launch_tile<Float16, 0>(label, call, plan, stream, status)
                          : launch_tile<Float16, 1>(label, call, plan, stream, status);
  return plan.tile == 0 ? launch_tile<BFloat16, 0>(label, call, plan, stream, status)
                        : launch_tile<BFloat16, 1>(label, call, plan, stream, status);
}

}  // namespace fastnn::cuda

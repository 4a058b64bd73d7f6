// The weights of attention on CUDA, host side.
#include "cuda/attention_weights.cuh"

#include "cuda/attention_fill.h"

namespace fastnn::cuda {
namespace {

template <class T>
Status run(const AttentionParams& p, const AttentionPlan& plan, const AttentionWeights& w, Stream stream) {
  using Kernel = AttentionWeightsKernel<T>;
  const auto tiles = [](int64_t n) { return (n + Kernel::kSide - 1) / Kernel::kSide; };
  const int64_t blocks = p.heads / w.averaged * tiles(p.query_length) * tiles(p.key_length);
  if (blocks > std::numeric_limits<int32_t>::max())
    return refused("attention_weights", p, plan, "more blocks than a grid holds");
  if (blocks == 0) return {};
  return launch_labelled("attention_weights_kernel", p, plan, attention_weights_kernel<T>,
                         dim3(static_cast<unsigned>(blocks)), Kernel::kThreads, Kernel::kSharedBytes, stream, w);
}

}  // namespace

Status attention_weights(const AttentionWeightsParams& g, const int64_t* philox_seed, Stream stream) {
  const AttentionParams& p = g.forward;
  const AttentionPlan plan = {AttentionKernel::Simt, 0, 1, 1, 1, 0};
  AttentionWeights w = {};
  AttentionParams own = p;  // value and output are not looked at
  own.value = p.key, own.output = {nullptr, p.query.offset, 0};
  if (const char* reason = fill(own, philox_seed, w.forward)) return refused("attention_weights", p, plan, reason);
  w.weights = g.weights, w.averaged = static_cast<int>(g.averaged);
  if (w.averaged == 0) return {};
  switch (p.dtype) {
    case DType::Float32: return run<float>(p, plan, w, stream);
    case DType::Float64: return run<double>(p, plan, w, stream);
    case DType::BFloat16: return run<BFloat16>(p, plan, w, stream);
    case DType::Float16: return run<Float16>(p, plan, w, stream);
  }
  return {};
}

}  // namespace fastnn::cuda

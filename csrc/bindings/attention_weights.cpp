// fastnn::attention_weights, attention that returns the weights, too: the op, its autograd, Python's way in.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "bindings/attention.h"
#include "bindings/cuda.h"

namespace fastnn::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using AttentionWeights = std::tuple<Tensor, Tensor, Tensor>;

// The kernels of the device that the tensors are on.
void run(const Tensor& query, const AttentionWeightsParams& p, const OptionalTensor& philox_seed) {
  if constexpr (kCuda)
    if (on_cuda(query))
      return call_cuda("attention_weights", query,
                       [&](auto, auto stream) { return cuda::attention_weights(p, seed_of(philox_seed), stream); });
  cpu::attention_weights(p);
}

AttentionWeights attention_weights_kernel(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                          std::optional<double> scale, bool enable_gqa, Window window,
                                          std::optional<double> softcap, const OptionalTensor& philox_seed,
                                          bool average) {
  AttentionProblem q = check_attention(query, key, value, attn_mask,
                                       {dropout_p, is_causal, scale, enable_gqa, window, softcap}, philox_seed);
  AttentionParams& p = q.params;
  TORCH_CHECK(!average || !q.lead.empty(),
              "fastnn.attention_weights: query must have a dimension of heads to average; got ", query.sizes(), ".");
  const Tensor rows = at::empty({2, p.heads, p.query_length}, query.options().dtype(compute_type(query)));
  p.maximum = rows[0].mutable_data_ptr(), p.sum = rows[1].mutable_data_ptr();
  p.nan_unseen = true;
  auto [output, lse] = attend(q, query, philox_seed);

  Sizes sizes = joined(q.lead, {p.query_length, p.key_length});
  if (average) sizes.erase(sizes.end() - 3);
  const AttentionWeightsParams w = {p, average ? q.lead.back() : 1, nullptr};
  if (w.averaged == 0)  // the mean of nothing
    return {output, lse, at::full(sizes, std::numeric_limits<double>::quiet_NaN(), query.options())};
  Tensor weights = at::empty(sizes, query.options());
  if (weights.numel() > 0) run(query, {w.forward, w.averaged, weights.mutable_data_ptr()}, philox_seed);
  return {std::move(output), std::move(lse), std::move(weights)};
}

// The op, through the dispatcher.
AttentionWeights call_attention_weights(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const OptionalTensor& attn_mask, const AttentionOptions& o,
                                        const OptionalTensor& philox_seed, bool average) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::attention_weights", "")
                             .typed<decltype(attention_weights_kernel)>();
  return op.call(query, key, value, attn_mask, o.dropout_p, o.is_causal, o.scale, o.enable_gqa, o.window, o.softcap,
                 philox_seed, average);
}

// What a gradient of the weights adds. It is rare and has no kernel: fastnn/functional/attention_weights.py
// differentiates the formula.
using WeightsBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad_weights, const Tensor& query,
                                                           const Tensor& key, const Tensor& value,
                                                           const OptionalTensor& attn_mask, double dropout_p,
                                                           bool is_causal, std::optional<double> scale, bool enable_gqa,
                                                           Window window, std::optional<double> softcap,
                                                           const OptionalTensor& philox_seed, bool average,
                                                           std::array<bool, 3> output_mask);
variable_list differentiate_weights(const Tensor& grad_weights, const variable_list& saved, const AttentionOptions& o,
                                    bool average, std::array<bool, 4> wanted) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastnn::attention_weights_backward", "").typed<WeightsBackward>();
  auto [grad_query, grad_key, grad_mask] =
      op.call(grad_weights, saved[0], saved[1], saved[2], optional(saved[3]), o.dropout_p, o.is_causal, o.scale,
              o.enable_gqa, o.window, o.softcap, optional(saved[4]), average, {wanted[0], wanted[1], wanted[3]});
  return {grad_query, grad_key, Tensor(), grad_mask};
}

struct AttentionWeightsFunction : torch::autograd::Function<AttentionWeightsFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd: the backward consists of ops

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& philox_seed,
                               const AttentionOptions& o, bool average) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, lse, weights] = call_attention_weights(query, key, value, attn_mask, o, philox_seed, average);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {query, key, value, attn_mask.value_or(Tensor()), philox_seed.value_or(Tensor()), output, lse});
    keep_options(ctx, o);
    ctx->saved_data["average"] = average;
    return {output, lse, weights};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(7);
    const auto saved = ctx->get_saved_variables();
    const KeptOptions o(ctx);
    const std::array<bool, 4> wanted = wanted_gradients(ctx, saved[3]);
    const auto add = [&](const variable_list& found) {
      for (size_t i = 0; i < found.size(); ++i)
        if (found[i].defined()) result[i] = result[i].defined() ? result[i].add(found[i]) : found[i];
    };
    if (grads[0].defined() || grads[1].defined()) add(differentiate_attention(grads[0], grads[1], saved, o, wanted));
    if (grads[2].defined() && (wanted[0] || wanted[1] || wanted[3]))
      add(differentiate_weights(grads[2], saved, o, ctx->saved_data["average"].toBool(), wanted));
    return result;
  }
};

AttentionWeights attention_weights_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                            std::optional<double> scale, bool enable_gqa, Window window,
                                            std::optional<double> softcap, const OptionalTensor& philox_seed,
                                            bool average) {
  const AttentionOptions o{dropout_p, is_causal, scale, enable_gqa, window, softcap};
  if (wants_gradient(query, key, value, attn_mask)) {
    auto results = AttentionWeightsFunction::apply(query, key, value, attn_mask, philox_seed, o, average);
    return {std::move(results[0]), std::move(results[1]), std::move(results[2])};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention_weights(query, key, value, attn_mask, o, philox_seed, average);
}

// Output and weights; None where no kernel takes these arguments.
py::object attention_weights_entry(py::handle query, py::handle key, py::handle value, py::handle attn_mask,
                                   double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                                   const std::optional<Sizes>& window, std::optional<double> softcap, bool average) {
  const auto a = attention_arguments(query, key, value, attn_mask);
  if (!a) return py::none();
  AttentionWeights results;
  {
    py::gil_scoped_release no_gil;
    const AttentionOptions o{dropout_p, is_causal, scale, enable_gqa, window ? Window(*window) : Window(), softcap};
    results = call_attention_weights(a->query, a->key, a->value, a->attn_mask, o, draw_philox_seed(dropout_p, a->query),
                                     average);
  }
  return py::make_tuple(wrap(std::move(std::get<0>(results))), wrap(std::move(std::get<2>(results))));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
      "bool is_causal=False, float? scale=None, bool enable_gqa=False, int[]? window=None, float? softcap=None, "
      "Tensor? philox_seed=None, bool average=False) -> (Tensor output, Tensor lse, Tensor weights)");
  m.def(
      "attention_weights_backward(Tensor grad_weights, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "float dropout_p, bool is_causal, float? scale, bool enable_gqa, int[]? window, float? softcap, "
      "Tensor? philox_seed, bool average, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) { m.impl("attention_weights", attention_weights_kernel); }
#ifdef FASTNN_CUDA
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) { m.impl("attention_weights", attention_weights_kernel); }
#endif
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("attention_weights", attention_weights_autograd); }

void bind_attention_weights(py::module_& m) { m.def("attention_weights", attention_weights_entry); }

}  // namespace fastnn::bindings

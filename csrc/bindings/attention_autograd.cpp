// The autograd of fastnn::attention: its backward is the op fastnn::attention_backward.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/attention.h"

namespace fastnn::bindings {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> call_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const OptionalTensor& attn_mask, const AttentionOptions& o,
                                          const OptionalTensor& philox_seed) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastnn::attention", "").typed<decltype(attention_kernel)>();
  return op.call(query, key, value, attn_mask, o.dropout_p, o.is_causal, o.scale, o.enable_gqa, o.window, o.softcap,
                 philox_seed);
}

void keep_options(AutogradContext* ctx, const AttentionOptions& o) {
  auto& data = ctx->saved_data;
  data["dropout_p"] = o.dropout_p, data["is_causal"] = o.is_causal, data["enable_gqa"] = o.enable_gqa;
  if (o.scale) data["scale"] = *o.scale;
  if (o.softcap) data["softcap"] = *o.softcap;
  if (o.window) data["window"] = o.window->vec();
}
KeptOptions::KeptOptions(AutogradContext* ctx) : AttentionOptions{} {
  auto& data = ctx->saved_data;
  dropout_p = data["dropout_p"].toDouble(), is_causal = data["is_causal"].toBool();
  enable_gqa = data["enable_gqa"].toBool();
  if (data.count("scale")) scale = data["scale"].toDouble();
  if (data.count("softcap")) softcap = data["softcap"].toDouble();
  if (data.count("window")) own_window = data["window"].toIntVector(), window = Window(own_window);
}

std::vector<Tensor> differentiate_attention(const Tensor& grad_output, const Tensor& grad_lse,
                                            const std::vector<Tensor>& saved, const AttentionOptions& o,
                                            std::array<bool, 4> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::attention_backward", "")
                             .typed<decltype(attention_backward_kernel)>();
  const auto call = [&] {
    const Tensor grad = grad_output.defined() ? grad_output : at::zeros_like(saved[5]);
    auto [grad_query, grad_key, grad_value, grad_mask] =
        op.call(grad, optional(grad_lse), saved[0], saved[1], saved[2], optional(saved[3]), saved[5], saved[6],
                o.dropout_p, o.is_causal, o.scale, o.enable_gqa, o.window, o.softcap, optional(saved[4]), wanted);
    return std::vector<Tensor>{grad_query, grad_key, grad_value, grad_mask};
  };
  if (at::GradMode::is_enabled()) return call();  // create_graph: through Autograd, whose formula is in reference.py
  at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}
std::array<bool, 4> wanted_gradients(AutogradContext* ctx, const Tensor& attn_mask) {
  return {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
          attn_mask.defined() && attn_mask.is_floating_point() && ctx->needs_input_grad(3)};
}

namespace {

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd: the backward is one op

  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& philox_seed,
                               const AttentionOptions& o) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, lse] = call_attention(query, key, value, attn_mask, o, philox_seed);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {query, key, value, attn_mask.value_or(Tensor()), philox_seed.value_or(Tensor()), output, lse});
    keep_options(ctx, o);
    return {output, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto found =
        differentiate_attention(grads[0], grads[1], saved, KeptOptions(ctx), wanted_gradients(ctx, saved[3]));
    std::copy(found.begin(), found.end(), result.begin());
    return result;
  }
};

std::tuple<Tensor, Tensor> attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                              std::optional<double> scale, bool enable_gqa, Window window,
                                              std::optional<double> softcap, const OptionalTensor& philox_seed) {
  const AttentionOptions o{dropout_p, is_causal, scale, enable_gqa, window, softcap};
  if (wants_gradient(query, key, value, attn_mask)) {
    auto results = AttentionFunction::apply(query, key, value, attn_mask, philox_seed, o);
    return {std::move(results[0]), std::move(results[1])};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention(query, key, value, attn_mask, o, philox_seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("attention", attention_autograd); }

}  // namespace fastnn::bindings

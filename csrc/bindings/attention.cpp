// fastnn::attention and its backward: allocate, call the kernels; the schemas, and Python's way in.
#include "bindings/attention.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <torch/library.h>

#include <limits>

#include "bindings/cuda.h"

namespace fastnn::bindings {
namespace {

// The kernels of the device that the tensors are on.
void run(const Tensor& query, const AttentionParams& p, const OptionalTensor& philox_seed) {
  if constexpr (kCuda)
    if (on_cuda(query))
      return call_cuda("attention", query,
                       [&](auto... where) { return cuda::attention_forward(p, seed_of(philox_seed), where...); });
  cpu::attention_forward(p);
}
void run(const Tensor& query, const AttentionBackwardParams& p, const OptionalTensor& philox_seed) {
  if constexpr (kCuda)
    if (on_cuda(query))
      return call_cuda("attention_backward", query,
                       [&](auto... where) { return cuda::attention_backward(p, seed_of(philox_seed), where...); });
  cpu::attention_backward(p);
}

// [*lead, rows, cols] with unit stride in cols; heads lie inside positions where they do in `like`, as torch has it.
Tensor empty_like_query(const Tensor& like, const Sizes& lead, int64_t rows, int64_t cols) {
  if (like.dim() == 4 && lead.size() == 2 && like.stride(1) < like.stride(2))
    return at::empty({lead[0], rows, lead[1], cols}, like.options()).transpose(1, 2);
  return at::empty(joined(lead, {rows, cols}), like.options());
}

// A gradient of key or value, [*key_lead, positions, features], summed to the shape of its tensor.
Tensor summed(Tensor grad, const Tensor& like, bool enable_gqa) {
  if (!grad.defined() || grad.sizes() == like.sizes()) return grad;
  if (enable_gqa && grad.size(-3) != like.size(-3))  // key and value repeat differently: heads apart, then summed
    grad = grad.unflatten(-3, {like.size(-3), grad.size(-3) / like.size(-3)}).sum(-3);
  return at::sum_to(std::move(grad), like.sizes());
}

}  // namespace

std::tuple<Tensor, Tensor> attend(AttentionProblem& q, const Tensor& query, const OptionalTensor& philox_seed) {
  AttentionParams& p = q.params;
  Tensor output = empty_like_query(query, q.lead, p.query_length, p.value_dim);
  Tensor lse = at::empty(joined(q.lead, {p.query_length}), query.options().dtype(compute_type(query)));
  q.output_at = starts(output);
  p.output = {output.mutable_data_ptr(), q.output_at.data(), output.stride(-2)};
  p.lse = lse.mutable_data_ptr();
  if (lse.numel() > 0) run(query, p, philox_seed);
  return {std::move(output), std::move(lse)};
}

std::tuple<Tensor, Tensor> attention_kernel(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                            std::optional<double> scale, bool enable_gqa, Window window,
                                            std::optional<double> softcap, const OptionalTensor& philox_seed) {
  AttentionProblem q = check_attention(query, key, value, attn_mask,
                                       {dropout_p, is_causal, scale, enable_gqa, window, softcap}, philox_seed);
  return attend(q, query, philox_seed);
}

AttentionGradients attention_backward_kernel(const Tensor& grad_output, const OptionalTensor& grad_lse,
                                             const Tensor& query, const Tensor& key, const Tensor& value,
                                             const OptionalTensor& attn_mask, const Tensor& output, const Tensor& lse,
                                             double dropout_p, bool is_causal, std::optional<double> scale,
                                             bool enable_gqa, Window window, std::optional<double> softcap,
                                             const OptionalTensor& philox_seed, std::array<bool, 4> output_mask) {
  AttentionProblem q = check_attention(query, key, value, attn_mask,
                                       {dropout_p, is_causal, scale, enable_gqa, window, softcap}, philox_seed);
  AttentionBackwardParams b = {};
  AttentionParams& p = q.params;
  check_same("attention_backward", "grad_output", grad_output, query, "query");
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(joined(q.lead, {p.query_length, p.value_dim})) &&
                  output.sizes() == grad_output.sizes(),
              "fastnn.attention_backward: grad_output and output must be ",
              at::IntArrayRef(joined(q.lead, {p.query_length, p.value_dim})), "; got ", grad_output.sizes(), " and ",
              output.sizes(), ".");
  const Tensor kept = output.stride(-1) == 1 || output.size(-1) <= 1 ? output : output.contiguous();
  const Tensor kept_lse = lse.contiguous();
  q.output_at = starts(kept);
  p.output = {const_cast<void*>(kept.const_data_ptr()), q.output_at.data(), kept.stride(-2)};
  p.lse = const_cast<void*>(kept_lse.const_data_ptr());
  const Sizes grad_at = starts(grad_output);
  b.grad_output = operand(grad_output, grad_at);
  Tensor kept_grad_lse;
  if (grad_lse && grad_lse->defined()) {
    kept_grad_lse = grad_lse->to(lse.scalar_type()).contiguous();
    b.grad_lse = kept_grad_lse.const_data_ptr();
  }

  Tensor grad_query, grad_key, grad_value, grad_mask;
  Sizes grad_query_at, grad_key_at, grad_value_at, mask_index;
  const auto result = [&](bool wanted, Tensor& grad, Sizes& at, const Tensor& like, const Sizes& lead) {
    if (!wanted) return AttentionResult{nullptr, nullptr, 0};
    grad = empty_like_query(like, lead, like.size(-2), like.size(-1));
    at = starts(grad);
    return AttentionResult{grad.mutable_data_ptr(), at.data(), grad.stride(-2)};
  };
  b.grad_query = result(output_mask[0], grad_query, grad_query_at, query, q.lead);
  b.grad_key = result(output_mask[1], grad_key, grad_key_at, key, q.key_lead);
  b.grad_value = result(output_mask[2], grad_value, grad_value_at, value, q.key_lead);
  if (output_mask[3] && attn_mask && p.mask_type != AttentionMask::Bool) {
    grad_mask = at::empty(attn_mask->sizes(), lse.options());
    mask_index = grad_mask.dim() > 2 ? starts(grad_mask, q.lead, 2) : Sizes(p.heads, 0);
    b.mask_rows = grad_mask.dim() > 1 ? grad_mask.size(-2) : 1,
    b.mask_cols = grad_mask.dim() > 0 ? grad_mask.size(-1) : 1;
    const int64_t size = b.mask_rows * b.mask_cols;
    b.mask_heads = size > 0 ? grad_mask.numel() / size : 0;
    for (int64_t& index : mask_index) index = size > 0 ? index / size : 0;
    b.mask_index = mask_index.data();
    b.grad_mask = grad_mask.numel() > 0 ? grad_mask.mutable_data_ptr() : nullptr;
  }
  b.forward = p;
  run(query, b, philox_seed);
  if (grad_mask.defined()) grad_mask = grad_mask.to(attn_mask->scalar_type());
  if (grad_query.defined()) grad_query = at::sum_to(std::move(grad_query), query.sizes());
  return {std::move(grad_query), summed(std::move(grad_key), key, enable_gqa),
          summed(std::move(grad_value), value, enable_gqa), std::move(grad_mask)};
}

// ---- Python's way in -----------------------------------------------------------------------------------------------

std::optional<AttentionArguments> attention_arguments(py::handle query, py::handle key, py::handle value,
                                                      py::handle attn_mask) {
  if (!plain(query) || !plain(key) || !plain(value) || !plain(attn_mask)) return std::nullopt;
  AttentionArguments a = {tensor_argument("attention", "query", query), tensor_argument("attention", "key", key),
                          tensor_argument("attention", "value", value),
                          optional_tensor_argument("attention", "attn_mask", attn_mask)};
  const bool plain_mask = !a.attn_mask || (a.attn_mask->layout() == at::kStrided && !a.attn_mask->is_nested());
  if (!served_on_cuda(a.query) || !served_on_cuda(a.key) || !served_on_cuda(a.value) || !plain_mask)
    return std::nullopt;
  return a;
}
OptionalTensor draw_philox_seed(double dropout_p, const Tensor& query) {
  if (!(dropout_p > 0)) return std::nullopt;
  return at::randint(std::numeric_limits<int64_t>::max(), {1}, query.options().dtype(at::kLong));
}

namespace {

// None where no kernel takes these arguments.
py::object attention_entry(py::handle query, py::handle key, py::handle value, py::handle attn_mask, double dropout_p,
                           bool is_causal, std::optional<double> scale, bool enable_gqa,
                           const std::optional<Sizes>& window, std::optional<double> softcap, bool return_lse) {
  const auto a = attention_arguments(query, key, value, attn_mask);
  if (!a) return py::none();
  std::tuple<Tensor, Tensor> results;
  {
    py::gil_scoped_release no_gil;
    const AttentionOptions o{dropout_p, is_causal, scale, enable_gqa, window ? Window(*window) : Window(), softcap};
    results = call_attention(a->query, a->key, a->value, a->attn_mask, o, draw_philox_seed(dropout_p, a->query));
  }
  if (!return_lse) return wrap(std::move(std::get<0>(results)));
  return py::make_tuple(wrap(std::move(std::get<0>(results))), wrap(std::move(std::get<1>(results))));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
      "bool is_causal=False, float? scale=None, bool enable_gqa=False, int[]? window=None, float? softcap=None, "
      "Tensor? philox_seed=None) -> (Tensor output, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? attn_mask, Tensor output, Tensor lse, float dropout_p, bool is_causal, float? scale, bool enable_gqa, "
      "int[]? window, float? softcap, Tensor? philox_seed, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("attention", attention_kernel);
  m.impl("attention_backward", attention_backward_kernel);
}
#ifdef FASTNN_CUDA
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("attention", attention_kernel);
  m.impl("attention_backward", attention_backward_kernel);
}
#endif

void bind_attention(py::module_& m) { m.def("attention", attention_entry); }

}  // namespace fastnn::bindings

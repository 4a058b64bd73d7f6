// fastnn::attention and its backward: check, allocate, fill the params, call the kernels.
#include "fastnn/attention.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "bindings/checks.h"

namespace fastnn::bindings {
namespace {

using Sizes = std::vector<int64_t>;
using Window = at::OptionalIntArrayRef;

// What the caller chose beside the tensors.
struct Options {
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  bool enable_gqa;
  Window window;
  std::optional<double> softcap;
};

// Sizes, and where each head of each operand starts. Kept alive while the kernel runs.
struct Problem {
  AttentionParams params;
  Sizes lead, key_lead;  // the broadcast leading dimensions; of key and value as the kernel sees them
  Sizes query_at, key_at, value_at, mask_at, output_at;
};

// Elements from the start of t to each index of `lead`, in row-major order, where t's leading dimensions are broadcast
// to `lead` (its last one, if it is `repeat` times smaller, index by index).
Sizes starts(const Tensor& t, const Sizes& lead, int64_t matrix_dims, int64_t repeat = 1) {
  const int64_t own = t.dim() - matrix_dims, dims = static_cast<int64_t>(lead.size());
  Sizes at = {0};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t mine = d - (dims - own);
    const int64_t stride = mine < 0 || t.size(mine) == 1 ? 0 : t.stride(mine);
    Sizes next;
    next.reserve(at.size() * lead[d]);
    for (const int64_t base : at)
      for (int64_t i = 0; i < lead[d]; ++i) next.push_back(base + (d == dims - 1 ? i / repeat : i) * stride);
    at = std::move(next);
  }
  return at;
}
Sizes starts(const Tensor& t, int64_t matrix_dims = 2) {
  return starts(t, Sizes(t.sizes().begin(), t.sizes().end() - matrix_dims), matrix_dims);
}
Sizes leading(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end() - 2); }
Sizes joined(Sizes lead, std::initializer_list<int64_t> rest) {
  lead.insert(lead.end(), rest);
  return lead;
}
int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}
AttentionOperand operand(const Tensor& t, const Sizes& at) {
  return {t.const_data_ptr(), at.data(), t.stride(-2), t.stride(-1)};
}

// [*lead, rows, cols] with unit stride in cols; heads lie inside positions where they do in `like`, as torch has it.
Tensor empty_like_query(const Tensor& like, const Sizes& lead, int64_t rows, int64_t cols) {
  if (like.dim() == 4 && lead.size() == 2 && like.stride(1) < like.stride(2))
    return at::empty({lead[0], rows, lead[1], cols}, like.options()).transpose(1, 2);
  return at::empty(joined(lead, {rows, cols}), like.options());
}

void check_options(const Options& o, bool has_mask, const OptionalTensor& philox_seed) {
  TORCH_CHECK(!(o.is_causal && has_mask), "fastnn.attention: attn_mask must be None when is_causal is set; got both.");
  TORCH_CHECK(o.dropout_p >= 0 && o.dropout_p <= 1, "fastnn.attention: dropout_p must be between 0 and 1; got ",
              o.dropout_p, ".");
  TORCH_CHECK_VALUE(!o.softcap || *o.softcap >= 0,
                    "fastnn.attention: softcap must be positive, or 0 or None for none; got ", *o.softcap, ".");
  TORCH_CHECK_VALUE(!o.window || (o.window->size() == 2 && (*o.window)[0] >= -1 && (*o.window)[1] >= -1),
                    "fastnn.attention: window must be None, an int, or (left, right), -1 for no limit; got ", *o.window,
                    ".");
  TORCH_CHECK(o.dropout_p == 0 || (philox_seed && philox_seed->numel() == 1 && philox_seed->scalar_type() == at::kLong),
              "fastnn.attention: philox_seed must be one int64 when dropout_p > 0.");
}

Problem check(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, const Options& o,
              const OptionalTensor& philox_seed) {
  check_options(o, mask.has_value(), philox_seed);
  TORCH_CHECK(query.dim() >= 2 && key.dim() >= 2 && value.dim() >= 2,
              "fastnn.attention: query, key and value must have at least 2 dimensions; got ", query.sizes(), ", ",
              key.sizes(), " and ", value.sizes(), ".");
  check_same("attention", "key", key, query, "query");
  check_same("attention", "value", value, query, "query");
  TORCH_CHECK(query.size(-1) == key.size(-1), "fastnn.attention: key must have query's last dimension, ",
              query.size(-1), "; got ", key.sizes(), ".");
  TORCH_CHECK(key.size(-2) == value.size(-2), "fastnn.attention: value must have as many positions as key, ",
              key.size(-2), "; got ", value.sizes(), ".");
  Problem q;
  AttentionParams& p = q.params;
  p = {};
  p.dtype = *dtype_of(query);
  p.query_length = query.size(-2), p.key_length = key.size(-2), p.head_dim = query.size(-1),
  p.value_dim = value.size(-1);

  Sizes key_lead = leading(key), value_lead = leading(value);
  int64_t key_repeat = 1, value_repeat = 1;
  if (o.enable_gqa) {
    TORCH_CHECK_INDEX(query.dim() >= 3 && key.dim() >= 3 && value.dim() >= 3,
                      "fastnn.attention: query, key and value must have a dimension of heads with enable_gqa; got ",
                      query.sizes(), ", ", key.sizes(), " and ", value.sizes(), ".");
    const int64_t heads = query.size(-3);
    for (auto [lead, repeat] : {std::pair{&key_lead, &key_repeat}, std::pair{&value_lead, &value_repeat}}) {
      TORCH_CHECK(lead->back() > 0 && heads % lead->back() == 0,
                  "fastnn.attention: heads of key and value must divide those of query, ", heads, "; got ",
                  lead->back(), ".");
      *repeat = heads / lead->back();
      lead->back() = heads;
    }
  }
  q.lead = at::infer_size(at::infer_size(leading(query), key_lead), value_lead);
  // Heads that share key and value are one group: grouped queries, or key and value that are broadcast over heads.
  const int64_t heads = q.lead.empty() ? 1 : q.lead.back();
  const auto own_heads = [](const Tensor& t) { return t.dim() > 2 ? t.size(-3) : 1; };
  const bool shared = own_heads(key) == own_heads(value) && (key_repeat == value_repeat) && heads > 0 &&
                      (key_repeat > 1 || own_heads(key) == 1);
  p.group = !shared ? 1 : heads / own_heads(key);
  q.key_lead = q.lead;
  if (shared && !q.lead.empty()) q.key_lead.back() = own_heads(key);
  p.heads = product(q.lead);
  q.query_at = starts(query, q.lead, 2);
  q.key_at = starts(key, q.key_lead, 2, shared ? 1 : key_repeat);
  q.value_at = starts(value, q.key_lead, 2, shared ? 1 : value_repeat);
  p.query = operand(query, q.query_at), p.key = operand(key, q.key_at), p.value = operand(value, q.value_at);

  p.mask_type = AttentionMask::None;
  if (mask) {
    TORCH_CHECK(mask->scalar_type() == at::kBool || mask->scalar_type() == at::kFloat ||
                    mask->scalar_type() == query.scalar_type(),
                "fastnn.attention: attn_mask must be of bool, float or query's dtype (", query.scalar_type(), "); got ",
                mask->scalar_type(), ".");
    TORCH_CHECK(mask->device() == query.device(), "fastnn.attention: attn_mask must be on query's device (",
                query.device(), "); got ", mask->device(), ".");
    const Sizes full = joined(q.lead, {p.query_length, p.key_length});
    TORCH_CHECK(at::is_expandable_to(mask->sizes(), full), "fastnn.attention: attn_mask must be broadcastable to ",
                at::IntArrayRef(full), "; got ", mask->sizes(), ".");
    p.mask_type = mask->scalar_type() == at::kBool             ? AttentionMask::Bool
                  : mask->scalar_type() == query.scalar_type() ? AttentionMask::Query
                                                               : AttentionMask::Float32;
    const int64_t rows = mask->dim() > 1 ? mask->size(-2) : 1, cols = mask->dim() > 0 ? mask->size(-1) : 1;
    q.mask_at = mask->dim() > 2 ? starts(*mask, q.lead, 2) : Sizes(p.heads, 0);
    p.mask = {mask->const_data_ptr(), q.mask_at.data(), rows == 1 ? 0 : mask->stride(-2),
              cols == 1 ? 0 : mask->stride(-1)};
  }

  p.scale = p.head_dim == 0 ? 1 : o.scale.value_or(1 / std::sqrt(static_cast<double>(p.head_dim)));
  p.softcap = o.softcap.value_or(0);
  p.dropout_p = o.dropout_p;
  p.philox_seed = o.dropout_p > 0 ? static_cast<uint64_t>(*philox_seed->const_data_ptr<int64_t>()) : 0;
  p.first_shift = -kAttentionNoLimit, p.last_shift = o.is_causal ? 0 : kAttentionNoLimit;
  if (o.window) {
    const int64_t left = (*o.window)[0], right = (*o.window)[1], shift = p.key_length - p.query_length;
    if (left >= 0) p.first_shift = std::max(shift - std::min(left, kAttentionNoLimit), -kAttentionNoLimit);
    if (right >= 0) p.last_shift = std::min(p.last_shift, shift + std::min(right, kAttentionNoLimit));
  }
  p.threads = num_threads();
  return q;
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                         std::optional<double> scale, bool enable_gqa, Window window,
                                         std::optional<double> softcap, const OptionalTensor& philox_seed) {
  Problem q =
      check(query, key, value, attn_mask, {dropout_p, is_causal, scale, enable_gqa, window, softcap}, philox_seed);
  AttentionParams& p = q.params;
  Tensor output = empty_like_query(query, q.lead, p.query_length, p.value_dim);
  Tensor lse = at::empty(joined(q.lead, {p.query_length}),
                         query.options().dtype(p.dtype == DType::Float64 ? at::kDouble : at::kFloat));
  q.output_at = starts(output);
  p.output = {output.mutable_data_ptr(), q.output_at.data(), output.stride(-2)};
  p.lse = lse.mutable_data_ptr();
  if (lse.numel() > 0) cpu::attention_forward(p);
  return {std::move(output), std::move(lse)};
}

// A gradient of key or value, [*key_lead, positions, features], summed to the shape of its tensor.
Tensor summed(Tensor grad, const Tensor& like, bool enable_gqa) {
  if (!grad.defined() || grad.sizes() == like.sizes()) return grad;
  if (enable_gqa && grad.size(-3) != like.size(-3))  // key and value repeat differently: heads apart, then summed
    grad = grad.unflatten(-3, {like.size(-3), grad.size(-3) / like.size(-3)}).sum(-3);
  return at::sum_to(std::move(grad), like.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& attn_mask, const Tensor& output, const Tensor& lse, double dropout_p,
    bool is_causal, std::optional<double> scale, bool enable_gqa, Window window, std::optional<double> softcap,
    const OptionalTensor& philox_seed, std::array<bool, 4> output_mask) {
  Problem q =
      check(query, key, value, attn_mask, {dropout_p, is_causal, scale, enable_gqa, window, softcap}, philox_seed);
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
  cpu::attention_backward(b);
  if (grad_mask.defined()) grad_mask = grad_mask.to(attn_mask->scalar_type());
  if (grad_query.defined()) grad_query = at::sum_to(std::move(grad_query), query.sizes());
  return {std::move(grad_query), summed(std::move(grad_key), key, enable_gqa),
          summed(std::move(grad_value), value, enable_gqa), std::move(grad_mask)};
}

// ---- autograd ------------------------------------------------------------------------------------------------------

const auto& attention_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastnn::attention", "").typed<decltype(attention_cpu)>();
  return op;
}
const auto& attention_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::attention_backward", "")
                             .typed<decltype(attention_backward_cpu)>();
  return op;
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& query,
                                                const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
                                                const OptionalTensor& philox_seed, const Options& o) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, lse] = attention_op().call(query, key, value, attn_mask, o.dropout_p, o.is_causal, o.scale,
                                             o.enable_gqa, o.window, o.softcap, philox_seed);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {query, key, value, attn_mask.value_or(Tensor()), philox_seed.value_or(Tensor()), output, lse});
    ctx->saved_data["dropout_p"] = o.dropout_p;
    ctx->saved_data["is_causal"] = o.is_causal;
    ctx->saved_data["enable_gqa"] = o.enable_gqa;
    if (o.scale) ctx->saved_data["scale"] = *o.scale;
    if (o.softcap) ctx->saved_data["softcap"] = *o.softcap;
    if (o.window) ctx->saved_data["window"] = o.window->vec();
    return {output, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const OptionalTensor mask = optional(saved[3]), seed = optional(saved[4]), grad_lse = optional(grads[1]);
    if (!grads[0].defined() && !grad_lse) return torch::autograd::variable_list(6);
    auto& data = ctx->saved_data;
    const auto number = [&](const char* name) {
      return data.count(name) ? std::optional<double>(data[name].toDouble()) : std::nullopt;
    };
    const Sizes window = data.count("window") ? data["window"].toIntVector() : Sizes();
    const std::array<bool, 4> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                        mask && mask->is_floating_point() && ctx->needs_input_grad(3)};
    const auto call = [&] {
      const Tensor grad = grads[0].defined() ? grads[0] : at::zeros_like(saved[5]);
      auto [grad_query, grad_key, grad_value, grad_mask] = attention_backward_op().call(
          grad, grad_lse, saved[0], saved[1], saved[2], mask, saved[5], saved[6], data["dropout_p"].toDouble(),
          data["is_causal"].toBool(), number("scale"), data["enable_gqa"].toBool(),
          window.empty() ? Window() : Window(window), number("softcap"), seed, wanted);
      return torch::autograd::variable_list{grad_query, grad_key, grad_value, grad_mask, Tensor(), Tensor()};
    };
    if (at::GradMode::is_enabled()) return call();  // create_graph: through Autograd, whose formula is in reference.py
    at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  }
};

std::tuple<Tensor, Tensor> attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                              std::optional<double> scale, bool enable_gqa, Window window,
                                              std::optional<double> softcap, const OptionalTensor& philox_seed) {
  if (at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad() ||
                                     (attn_mask && attn_mask->requires_grad()))) {
    auto results = AttentionFunction::apply(query, key, value, attn_mask, philox_seed,
                                            Options{dropout_p, is_causal, scale, enable_gqa, window, softcap});
    return {std::move(results[0]), std::move(results[1])};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return attention_op().call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap,
                             philox_seed);
}

// Python's way in: None where no kernel takes these arguments.
py::object attention_entry(py::handle query, py::handle key, py::handle value, py::handle attn_mask, double dropout_p,
                           bool is_causal, std::optional<double> scale, bool enable_gqa,
                           const std::optional<Sizes>& window, std::optional<double> softcap, bool return_lse) {
  if (!plain(query) || !plain(key) || !plain(value) || !plain(attn_mask)) return py::none();
  const Tensor &q = tensor_argument("attention", "query", query), &k = tensor_argument("attention", "key", key);
  const Tensor& v = tensor_argument("attention", "value", value);
  const OptionalTensor mask = optional_tensor_argument("attention", "attn_mask", attn_mask);
  if (!served(q) || !served(k) || !served(v) || (mask && (mask->layout() != at::kStrided || mask->is_nested())))
    return py::none();
  std::tuple<Tensor, Tensor> results;
  {
    py::gil_scoped_release no_gil;
    OptionalTensor seed;
    if (dropout_p > 0)
      seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, at::TensorOptions().dtype(at::kLong));
    results = attention_op().call(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa,
                                  window ? Window(*window) : Window(), softcap, seed);
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
  m.impl("attention", attention_cpu);
  m.impl("attention_backward", attention_backward_cpu);
}
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("attention", attention_autograd); }

void bind_attention(py::module_& m) { m.def("attention", attention_entry); }

}  // namespace fastnn::bindings

// What the bindings of attention share: attention_check.cpp asks whether the arguments fit and fills the params,
// attention.cpp allocates and calls the kernels, attention_autograd.cpp differentiates, attention_weights.cpp is its sister.
#pragma once

#include <ATen/core/grad_mode.h>
#include <array>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "fastnn/attention.h"

namespace torch::autograd {
struct AutogradContext;
}

namespace fastnn::bindings {

using Sizes = std::vector<int64_t>;
using Window = at::OptionalIntArrayRef;

// What the caller chose beside the tensors.
struct AttentionOptions {
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  bool enable_gqa;
  Window window;
  std::optional<double> softcap;
};

// Sizes, and where each head of each operand starts. Kept alive while the kernel runs.
struct AttentionProblem {
  AttentionParams params;
  Sizes lead, key_lead;  // the broadcast leading dimensions; of key and value as the kernel sees them
  Sizes query_at, key_at, value_at, mask_at, output_at;
};
AttentionProblem check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const OptionalTensor& attn_mask, const AttentionOptions& o,
                                 const OptionalTensor& philox_seed);

// Elements from the start of t to each index of `lead`, in row-major order, where t's leading dimensions are broadcast
// to `lead` (its last one, if it is `repeat` times smaller, index by index).
Sizes starts(const Tensor& t, const Sizes& lead, int64_t matrix_dims, int64_t repeat = 1);
inline Sizes starts(const Tensor& t) { return starts(t, Sizes(t.sizes().begin(), t.sizes().end() - 2), 2); }
inline Sizes joined(Sizes lead, std::initializer_list<int64_t> rest) {
  lead.insert(lead.end(), rest);
  return lead;
}
inline at::ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline AttentionOperand operand(const Tensor& t, const Sizes& at) {
  return {t.const_data_ptr(), at.data(), t.stride(-2), t.stride(-1)};
}

// Where a GPU reads the seed itself, so that a captured graph draws anew; null: there is none.
inline const int64_t* seed_of(const OptionalTensor& philox_seed) {
  return philox_seed && philox_seed->defined() ? philox_seed->const_data_ptr<int64_t>() : nullptr;
}

// Allocates output and lse, and calls the kernel.
std::tuple<Tensor, Tensor> attend(AttentionProblem& q, const Tensor& query, const OptionalTensor& philox_seed);

// The op, through the dispatcher.
std::tuple<Tensor, Tensor> call_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const OptionalTensor& attn_mask, const AttentionOptions& o,
                                          const OptionalTensor& philox_seed);

// What the ops run, on the CPU and on CUDA; their types are the ops' schemas.
std::tuple<Tensor, Tensor> attention_kernel(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                            std::optional<double> scale, bool enable_gqa, Window window,
                                            std::optional<double> softcap, const OptionalTensor& philox_seed);
using AttentionGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
AttentionGradients attention_backward_kernel(const Tensor& grad_output, const OptionalTensor& grad_lse,
                                             const Tensor& query, const Tensor& key, const Tensor& value,
                                             const OptionalTensor& attn_mask, const Tensor& output, const Tensor& lse,
                                             double dropout_p, bool is_causal, std::optional<double> scale,
                                             bool enable_gqa, Window window, std::optional<double> softcap,
                                             const OptionalTensor& philox_seed, std::array<bool, 4> output_mask);

// A context keeps the options from the forward to the backward.
void keep_options(torch::autograd::AutogradContext* ctx, const AttentionOptions& o);
struct KeptOptions : AttentionOptions {
  Sizes own_window;
  explicit KeptOptions(torch::autograd::AutogradContext* ctx);
};
// The gradients of query, key, value and mask as a backward returns them; either gradient may be undefined, not both.
// `saved` is query, key, value, attn_mask, philox_seed, output, lse.
std::vector<Tensor> differentiate_attention(const Tensor& grad_output, const Tensor& grad_lse,
                                            const std::vector<Tensor>& saved, const AttentionOptions& o,
                                            std::array<bool, 4> wanted);
std::array<bool, 4> wanted_gradients(torch::autograd::AutogradContext* ctx, const Tensor& attn_mask);
inline bool wants_gradient(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask) {
  return at::GradMode::is_enabled() &&
         (query.requires_grad() || key.requires_grad() || value.requires_grad() || (mask && mask->requires_grad()));
}
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// What Python gave; none where no kernel takes it.
struct AttentionArguments {
  Tensor query, key, value;
  OptionalTensor attn_mask;
};
std::optional<AttentionArguments> attention_arguments(py::handle query, py::handle key, py::handle value,
                                                      py::handle attn_mask);
OptionalTensor draw_philox_seed(double dropout_p, const Tensor& query);

}  // namespace fastnn::bindings

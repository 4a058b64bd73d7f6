// Whether the arguments of fastnn::attention fit together, and the params that say so to the kernels.
#include <ATen/ExpandUtils.h>

#include <cmath>

#include "bindings/attention.h"

namespace fastnn::bindings {
namespace {

Sizes leading(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end() - 2); }
int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

void check_options(const Tensor& query, const AttentionOptions& o, bool has_mask, const OptionalTensor& philox_seed) {
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
  TORCH_CHECK(o.dropout_p == 0 || philox_seed->device() == query.device(),
              "fastnn.attention: philox_seed must be on query's device (", query.device(), "); got ",
              philox_seed->device(), ".");
}

}  // namespace

Sizes starts(const Tensor& t, const Sizes& lead, int64_t matrix_dims, int64_t repeat) {
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

AttentionProblem check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const OptionalTensor& mask, const AttentionOptions& o,
                                 const OptionalTensor& philox_seed) {
  check_options(query, o, mask.has_value(), philox_seed);
  TORCH_CHECK(query.dim() >= 2 && key.dim() >= 2 && value.dim() >= 2,
              "fastnn.attention: query, key and value must have at least 2 dimensions; got ", query.sizes(), ", ",
              key.sizes(), " and ", value.sizes(), ".");
  check_same("attention", "key", key, query, "query");
  check_same("attention", "value", value, query, "query");
  TORCH_CHECK(query.size(-1) == key.size(-1), "fastnn.attention: key must have query's last dimension, ",
              query.size(-1), "; got ", key.sizes(), ".");
  TORCH_CHECK(key.size(-2) == value.size(-2), "fastnn.attention: value must have as many positions as key, ",
              key.size(-2), "; got ", value.sizes(), ".");
  AttentionProblem q;
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
  const bool drawn = o.dropout_p > 0 && query.is_cpu();  // on a GPU the kernel reads the seed
  p.philox_seed = drawn ? static_cast<uint64_t>(*philox_seed->const_data_ptr<int64_t>()) : 0;
  p.first_shift = -kAttentionNoLimit, p.last_shift = o.is_causal ? 0 : kAttentionNoLimit;
  if (o.window) {
    const int64_t left = (*o.window)[0], right = (*o.window)[1], shift = p.key_length - p.query_length;
    if (left >= 0) p.first_shift = std::max(shift - std::min(left, kAttentionNoLimit), -kAttentionNoLimit);
    if (right >= 0) p.last_shift = std::min(p.last_shift, shift + std::min(right, kAttentionNoLimit));
  }
  p.threads = num_threads();
  return q;
}

}  // namespace fastnn::bindings

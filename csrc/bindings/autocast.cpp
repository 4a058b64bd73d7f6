// Under torch.autocast: the ops on tensors that are cast as torch casts those of the operators that they stand for. float64 is
// never cast. torch's own cast keeps the copies of weights for the rest of the region, and is differentiable: gradients
// arrive in the parameters' dtype.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include "bindings/attention.h"
#include "bindings/conv2d.h"

namespace fastnn::bindings {
namespace {

using c10::DeviceType;
using OptionalTensorList = std::optional<at::TensorList>;

template <class F>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// While it lives, calls go past autocast.
template <DeviceType DEVICE>
class Casting {
 public:
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(DEVICE);

  Tensor operator()(const Tensor& t) const { return at::autocast::cached_cast(dtype, t, DEVICE); }
  OptionalTensor operator()(const OptionalTensor& t) const { return at::autocast::cached_cast(dtype, t, DEVICE); }

 private:
  const c10::impl::ExcludeDispatchKeyGuard below_{at::autocast::get_autocast_dispatch_key_from_device_type(DEVICE)};
};

Tensor as(const Tensor& t, at::ScalarType type) {
  return at::autocast::is_eligible(t, t.device().type()) ? t.to(type) : t;
}
OptionalTensor as(const OptionalTensor& t, at::ScalarType type) { return t ? OptionalTensor(as(*t, type)) : t; }

// Panels of frozen float32 weights hold them unrounded: the call computes in float32 and rounds its result, which is the more
// precise, and casts no weight.
bool keeps_float(const Tensor& weight, const OptionalTensor& packed) {
  return packed && weight.scalar_type() == at::kFloat;
}

// torch keeps softplus and softmax in float32 on CUDA, and on the CPU in the dtype that they get.
template <DeviceType DEVICE>
Tensor widened(Tensor t) {
  return DEVICE == DeviceType::CUDA && t.scalar_type() != at::kDouble ? t.to(at::kFloat) : t;
}

template <DeviceType DEVICE>
Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Name activation,
              const OptionalTensor& packed) {
  static const auto op = find_op<decltype(linear<DEVICE>)>("fastnn::linear");
  const Casting<DEVICE> cast;
  if (keeps_float(weight, packed))
    return as(op.call(as(input, at::kFloat), weight, as(bias, at::kFloat), activation, packed), cast.dtype);
  Tensor output = op.call(cast(input), cast(weight), cast(bias), activation, packed);
  return activation == "softplus" ? widened<DEVICE>(std::move(output)) : output;
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation,
              const OptionalTensor& packed) {
  const Casting<DeviceType::CPU> cast;
  if (keeps_float(weight, packed))
    return as(call_conv2d(as(input, at::kFloat), weight, as(bias, at::kFloat), stride, padding, dilation, groups,
                          activation, packed),
              cast.dtype);
  return call_conv2d(cast(input), cast(weight), cast(bias), stride, padding, dilation, groups, activation, packed);
}

template <DeviceType DEVICE>
std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                     std::optional<double> scale, bool enable_gqa, Window window,
                                     std::optional<double> softcap, const OptionalTensor& philox_seed) {
  const Casting<DEVICE> cast;
  return call_attention(cast(query), cast(key), cast(value), cast(attn_mask),
                        {dropout_p, is_causal, scale, enable_gqa, window, softcap}, philox_seed);
}

template <DeviceType DEVICE>
std::tuple<Tensor, Tensor, Tensor> attention_weights(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                                                     std::optional<double> scale, bool enable_gqa, Window window,
                                                     std::optional<double> softcap, const OptionalTensor& philox_seed,
                                                     bool average) {
  static const auto op = find_op<decltype(attention_weights<DEVICE>)>("fastnn::attention_weights");
  const Casting<DEVICE> cast;
  auto [output, lse, weights] = op.call(cast(query), cast(key), cast(value), cast(attn_mask), dropout_p, is_causal,
                                        scale, enable_gqa, window, softcap, philox_seed, average);
  return {std::move(output), std::move(lse), widened<DEVICE>(std::move(weights))};
}

// torch's recurrent layers are many operators, of which autocast casts some. The kernel is one, and computes in float32
// anyway: it takes what is float32 unrounded, and gives its results the dtypes that torch's have.
std::tuple<Tensor, Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx,
                                       const OptionalTensor& cx, at::TensorList weights, std::string_view mode,
                                       OptionalTensorList packed, OptionalTensorList norms,
                                       const OptionalTensor& zoneout_mask, double zoneout) {
  static const auto op = find_op<decltype(rnn)>("fastnn::rnn");
  const Casting<DeviceType::CPU> cast;
  const auto promoted = [](at::ScalarType type, const Tensor& t) {
    return at::autocast::is_eligible(t, DeviceType::CPU) ? c10::promoteTypes(type, t.scalar_type()) : type;
  };
  at::ScalarType wide = cast.dtype;
  for (const Tensor& t : {input, hx, cx.value_or(Tensor())}) wide = promoted(wide, t);
  for (const at::TensorList& list : {weights, norms.value_or(at::TensorList())})
    for (const Tensor& t : list) wide = promoted(wide, t);
  const auto all = [&](at::TensorList list) {
    std::vector<Tensor> result;
    for (const Tensor& t : list) result.push_back(as(t, wide));
    return result;
  };
  const std::vector<Tensor> own = all(weights), scales = all(norms.value_or(at::TensorList()));
  auto [output, h_n, c_n] = op.call(as(input, wide), batch_sizes, as(hx, wide), as(cx, wide), own, mode, packed,
                                    norms ? OptionalTensorList(scales) : norms, zoneout_mask, zoneout);

  // What products make has autocast's dtype; what is added to a state of float32 stays float32.
  const bool sequences = batch_sizes && batch_sizes->defined(), step = input.dim() == 2 && !sequences;
  const int64_t directions = step ? 1 : hx.sym_size(0).guard_int(__FILE__, __LINE__);
  const bool projected = weights.size() / directions % 2 == 1;
  at::ScalarType h_type = cast.dtype, c_type = cast.dtype;
  if (mode == "GRU") h_type = promoted(h_type, hx);
  // An LSTM over a padded batch is one operator of torch, all of whose results are in autocast's dtype.
  if (mode == "LSTM" && (step || sequences || projected)) {
    c_type = promoted(c_type, *cx);
    if (!projected) h_type = c_type;
  }
  return {as(output, h_type), as(h_n, h_type), as(c_n, c_type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) {
  m.impl("linear", linear<DeviceType::CPU>);
  m.impl("conv2d", conv2d);
  m.impl("attention", attention<DeviceType::CPU>);
  m.impl("attention_weights", attention_weights<DeviceType::CPU>);
  m.impl("rnn", rnn);
}
#ifdef FASTNN_CUDA
TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) {
  m.impl("linear", linear<DeviceType::CUDA>);
  m.impl("attention", attention<DeviceType::CUDA>);
  m.impl("attention_weights", attention_weights<DeviceType::CUDA>);
}
#endif

}  // namespace fastnn::bindings

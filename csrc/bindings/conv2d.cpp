// fastnn::conv2d and its backward: check, allocate, fill the params, call the kernels.
#include "fastnn/conv2d.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

#include "bindings/checks.h"

namespace fastnn::bindings {
namespace {

using Name = std::optional<std::string_view>;
using at::IntArrayRef;

std::optional<Conv2dAlgorithm> forced_algorithm;  // by tests
std::atomic<bool> winograd_allowed{true};         // fastnn.backends.winograd

// A checked call: input with four dimensions, shape of the problem. padding is top, bottom, left, right.
struct Problem {
  Tensor input;         // [N, C, H, W]
  OptionalTensor bias;  // [K], contiguous
  bool batched;
  Conv2dShape shape;
  at::MemoryFormat format;
  std::vector<int64_t> output_shape;  // with N
};

Problem check(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
#define FASTNN_CHECK(condition, ...) TORCH_CHECK(condition, "fastnn.conv2d: ", __VA_ARGS__, ".")
  FASTNN_CHECK(input.dim() == 3 || input.dim() == 4, "input must be [C, H, W] or [N, C, H, W]; got ", input.sizes());
  FASTNN_CHECK(weight.dim() == 4, "weight must be [K, C / groups, R, S]; got ", weight.sizes());
  check_same("conv2d", "weight", weight, input, "input");
  FASTNN_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride must be positive; got ", stride);
  FASTNN_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, "dilation must be positive; got ", dilation);
  FASTNN_CHECK(padding.size() == 4, "padding must be top, bottom, left, right; got ", padding);
  for (const int64_t pad : padding) FASTNN_CHECK(pad >= 0, "padding must not be negative; got ", padding);
  FASTNN_CHECK(groups > 0, "groups must be positive; got ", groups);
  Problem p;
  p.batched = input.dim() == 4;
  p.input = p.batched ? input : input.unsqueeze(0);
  Conv2dShape& s = p.shape;
  s.N = p.input.size(0), s.C = p.input.size(1), s.H = p.input.size(2), s.W = p.input.size(3);
  s.K = weight.size(0), s.R = weight.size(2), s.S = weight.size(3);
  s.groups = groups;
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_top = padding[0], s.pad_left = padding[2];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  FASTNN_CHECK(s.K > 0 && s.K % groups == 0, "weight must have a positive multiple of groups = ", groups,
               " output channels; got ", weight.sizes());
  FASTNN_CHECK(s.C == weight.size(1) * groups, "input must have ", weight.size(1) * groups, " channels (weight is ",
               weight.sizes(), ", groups = ", groups, "); got ", input.sizes());
  FASTNN_CHECK(s.R > 0 && s.S > 0, "weight must have a kernel size above zero; got ", weight.sizes());
  FASTNN_CHECK((s.H > 0 && s.W > 0) || s.N == 0 || s.C == 0,
               "input must not be empty but for its batch or channels; got ", input.sizes());
  const int64_t rows = s.H + padding[0] + padding[1], columns = s.W + padding[2] + padding[3];
  const int64_t reach_h = (s.R - 1) * s.dilation_h + 1, reach_w = (s.S - 1) * s.dilation_w + 1;
  FASTNN_CHECK(rows >= reach_h && columns >= reach_w, "input with its padding (", rows, " x ", columns,
               ") must be no smaller than the dilated kernel; got a kernel of ", reach_h, " x ", reach_w);
  s.OH = (rows - reach_h) / s.stride_h + 1, s.OW = (columns - reach_w) / s.stride_w + 1;
  if (bias && bias->defined()) {
    check_same("conv2d", "bias", *bias, input, "input");
    FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == s.K, "bias must be [", s.K, "]; got ", bias->sizes());
    p.bias = bias->contiguous();
  }
#undef FASTNN_CHECK
  p.format = p.input.suggest_memory_format();
  if (p.format != at::MemoryFormat::ChannelsLast) p.format = weight.suggest_memory_format();
  if (p.format != at::MemoryFormat::ChannelsLast) p.format = at::MemoryFormat::Contiguous;
  s.channels_last = p.format == at::MemoryFormat::ChannelsLast;
  p.output_shape = {s.N, s.C == 0 ? 0 : s.K, s.OH, s.OW};  // torch gives no channels where it gets none
  return p;
}

// The rule, or what a test forces where it fits. frozen: the filter is packed before the call.
Conv2dAlgorithm choose(const Conv2dShape& s, bool winograd, bool frozen) {
  if (!forced_algorithm)
    return conv2d_algorithm(s, winograd && winograd_allowed.load(std::memory_order_relaxed), frozen);
  const bool fits = is_winograd(*forced_algorithm)                    ? winograd && s.winograd()
                    : *forced_algorithm == Conv2dAlgorithm::Pointwise ? s.pointwise()
                                                                      : true;
  return fits ? *forced_algorithm : Conv2dAlgorithm::Implicit;
}
Conv2dAlgorithm choose(const Conv2dShape& s, DType dtype, bool frozen) {
  return choose(s, dtype != DType::Float64 || forced_algorithm, frozen);
}

ImageStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// The input with unit stride where the kernels ask for it; a copy only where that is not so already.
Tensor lay_out(const Tensor& input, const Conv2dShape& s, at::MemoryFormat format, ImageStrides& strides) {
  const bool fits = s.channels_last ? s.C == 1 || input.stride(1) == 1 : s.W == 1 || input.stride(3) == 1;
  Tensor laid = fits ? input : input.contiguous(format);
  strides = strides_of(laid);
  (s.channels_last ? strides.channel : strides.column) = 1;
  if (s.channels_last && s.W == 1) strides.column = s.C;
  return laid;
}

void check_packed(const Tensor& packed, const Tensor& weight) {
  TORCH_CHECK(packed.is_contiguous() &&
                  packed.scalar_type() == (weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
              "fastnn.conv2d: packed must be what conv2d_pack made of this weight; got ", packed.scalar_type(), ".");
}

// [size] in NCHW; three dimensions for channels_last, five for Winograd, so that layouts, algorithms and, for Winograd,
// ISAs cannot be taken for one another.
std::vector<int64_t> packed_shape(const Conv2dParams& p) {
  const int64_t size = cpu::conv2d_packed_size(p);
  if (is_winograd(p.algorithm)) {
    const int64_t points = p.algorithm == Conv2dAlgorithm::Winograd2 ? 16 : 36, in = p.shape.group_in();
    const int64_t width = cpu::conv2d_panel_width(p);
    return {points, p.shape.groups, in ? size / (points * p.shape.groups * in * width) : 0, in, width};
  }
  if (!p.shape.channels_last) return {size};
  const int64_t depth = p.shape.group_in() * p.shape.R * p.shape.S;
  const int64_t lines = p.algorithm == Conv2dAlgorithm::Direct ? 1 : p.shape.groups;
  return {depth, lines, depth ? size / (depth * lines) : 0};
}

Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation, const OptionalTensor& packed,
               Tensor* pre_activation) {
  const Problem q = check(input, weight, bias, stride, padding, dilation, groups);
  Tensor output = at::empty(q.output_shape, input.options().memory_format(q.format));
  Conv2dParams p{};
  p.dtype = *dtype_of(input);
  p.shape = q.shape;
  p.activation = activation_of("conv2d", activation);
  const Tensor laid = lay_out(q.input, q.shape, q.format, p.input_strides);
  p.input = laid.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.weight_strides = strides_of(weight);
  if (packed) {
    check_packed(*packed, weight);
    p.algorithm = choose(q.shape, p.dtype, true);
    if (packed->sizes() == IntArrayRef(packed_shape(p))) p.packed = packed->const_data_ptr();
  }
  if (!p.packed) {
    p.algorithm = choose(q.shape, p.dtype, false);
    if (packed && packed->sizes() == IntArrayRef(packed_shape(p))) p.packed = packed->const_data_ptr();
  }
  p.bias = q.bias ? q.bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  if (pre_activation) {
    *pre_activation = at::empty(q.output_shape, input.options().memory_format(q.format));
    p.pre_activation = pre_activation->mutable_data_ptr();
    if (!q.batched) *pre_activation = pre_activation->squeeze(0);
  }
  p.threads = num_threads();
  if (output.numel() > 0) cpu::conv2d_forward(p);
  return q.batched ? output : output.squeeze(0);
}

Tensor conv2d_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                  IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation,
                  const OptionalTensor& packed) {
  return forward(input, weight, bias, stride, padding, dilation, groups, activation, packed, nullptr);
}

std::tuple<Tensor, Tensor> conv2d_train_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                            int64_t groups, Name activation) {
  Tensor pre_activation;
  Tensor output =
      forward(input, weight, bias, stride, padding, dilation, groups, activation, std::nullopt, &pre_activation);
  return {std::move(output), std::move(pre_activation)};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& saved, IntArrayRef stride,
                                                       IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                                       Name activation, std::array<bool, 3> output_mask) {
  const Problem q = check(input, weight, bias, stride, padding, dilation, groups);
  const Activation f = activation_of("conv2d_backward", activation);
  Tensor grad = q.batched ? grad_output : grad_output.unsqueeze(0);
  TORCH_CHECK(grad.sizes() == IntArrayRef(q.output_shape), "fastnn.conv2d_backward: grad_output must be ",
              IntArrayRef(q.output_shape), "; got ", grad_output.sizes(), ".");
  check_same("conv2d_backward", "grad_output", grad_output, input, "input");
  grad = grad.contiguous(q.format);
  if (f != Activation::None) {
    TORCH_CHECK(saved && saved->defined() && saved->numel() == grad.numel(),
                "fastnn.conv2d_backward: saved must hold the output or pre-activation of the forward.");
    const Tensor kept = (q.batched ? *saved : saved->unsqueeze(0)).contiguous(q.format);
    Tensor grad_pre = at::empty(q.output_shape, grad.options().memory_format(q.format));
    cpu::conv2d_activation_backward({*dtype_of(input), f, grad.const_data_ptr(), kept.const_data_ptr(),
                                     grad_pre.mutable_data_ptr(), grad.numel(), num_threads()});
    grad = grad_pre;
  }
  Conv2dBackwardParams p{};
  p.dtype = *dtype_of(input);
  p.shape = q.shape;
  p.algorithm = p.input_algorithm = choose(q.shape, false, false);
  const Conv2dAlgorithm transposed = choose(q.shape.transposed(), p.dtype, false);
  if (q.shape.winograd() && is_winograd(transposed)) p.input_algorithm = transposed;
  p.grad_output = grad.const_data_ptr();
  const Tensor laid = lay_out(q.input, q.shape, q.format, p.input_strides);
  p.input = laid.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.weight_strides = strides_of(weight);
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    grad_input = at::empty(q.input.sizes(), input.options().memory_format(q.format));
    p.grad_input = grad_input.mutable_data_ptr();
    if (!q.batched) grad_input = grad_input.squeeze(0);
  }
  if (output_mask[1]) {
    grad_weight = at::empty(weight.sizes(), weight.options().memory_format(q.format));
    p.grad_weight = grad_weight.mutable_data_ptr();
    p.grad_weight_strides = strides_of(grad_weight);
  }
  if (output_mask[2]) {
    grad_bias = at::empty({q.shape.K}, weight.options());
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  p.threads = num_threads();
  if (grad.numel() == 0 || q.shape.C == 0) {
    for (Tensor* t : {&grad_input, &grad_weight, &grad_bias})
      if (t->defined() && t->numel() > 0) std::memset(t->mutable_data_ptr(), 0, t->nbytes());
  } else {
    cpu::conv2d_backward(p);
  }
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

Conv2dAlgorithm algorithm_of(std::string_view name) {
  std::string known;
  for (int i = 0; i < static_cast<int>(std::size(kConv2dAlgorithmNames)); ++i) {
    if (name == kConv2dAlgorithmNames[i]) return static_cast<Conv2dAlgorithm>(i);
    known += std::string(i ? ", " : "") + kConv2dAlgorithmNames[i];
  }
  TORCH_CHECK_VALUE(false, "fastnn.conv2d: algorithm must be one of ", known, "; got '", std::string(name), "'.");
}

// The params that packing reads.
Conv2dParams pack_params(IntArrayRef weight_sizes, DType dtype, int64_t groups, bool channels_last, Name algorithm) {
  Conv2dParams p{};
  p.dtype = dtype;
  p.shape.K = weight_sizes[0], p.shape.C = weight_sizes[1] * groups;
  p.shape.R = weight_sizes[2], p.shape.S = weight_sizes[3];
  p.shape.groups = groups;
  p.shape.stride_h = p.shape.stride_w = p.shape.dilation_h = p.shape.dilation_w = 1;
  p.shape.channels_last = channels_last;
  p.algorithm = algorithm ? algorithm_of(*algorithm) : choose(p.shape, forced_algorithm.has_value(), true);
  TORCH_CHECK_VALUE(!is_winograd(p.algorithm) || p.shape.winograd(),
                    "fastnn.conv2d_pack: algorithm must fit the weight ", weight_sizes, "; got '",
                    kConv2dAlgorithmNames[static_cast<int>(p.algorithm)], "'.");
  p.threads = num_threads();
  return p;
}

Tensor conv2d_pack_cpu(const Tensor& weight, int64_t groups, bool channels_last, Name algorithm) {
  TORCH_CHECK(weight.dim() == 4 && dtype_of(weight) && groups > 0 && weight.size(0) % groups == 0,
              "fastnn.conv2d_pack: weight must be [K, C / groups, R, S] of float32, float64, bfloat16 or float16; got ",
              weight.scalar_type(), " ", weight.sizes(), ".");
  Conv2dParams p = pack_params(weight.sizes(), *dtype_of(weight), groups, channels_last, algorithm);
  p.weight = weight.const_data_ptr();
  p.weight_strides = strides_of(weight);
  Tensor packed =
      at::empty(packed_shape(p), weight.options().dtype(p.dtype == DType::Float64 ? at::kDouble : at::kFloat));
  if (packed.numel() > 0) cpu::conv2d_pack(p, packed.mutable_data_ptr());
  return packed;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

template <class F>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
const auto& conv2d_op() {
  static const auto op = find_op<decltype(conv2d_cpu)>("fastnn::conv2d");
  return op;
}
const auto& conv2d_train_op() {
  static const auto op = find_op<decltype(conv2d_train_cpu)>("fastnn::conv2d_train");
  return op;
}
const auto& conv2d_backward_op() {
  static const auto op = find_op<decltype(conv2d_backward_cpu)>("fastnn::conv2d_backward");
  return op;
}

struct Conv2dFunction : torch::autograd::Function<Conv2dFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        int64_t groups, Name activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Activation a = activation_of("conv2d", activation);
    Tensor output, saved;
    if (activation_from_output(a)) {
      output = conv2d_op().call(input, weight, bias, stride, padding, dilation, groups, activation, std::nullopt);
      if (a != Activation::None) saved = output;
    } else {
      std::tie(output, saved) =
          conv2d_train_op().call(input, weight, bias, stride, padding, dilation, groups, activation);
    }
    ctx->save_for_backward({input, weight, bias.value_or(Tensor()), saved});
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["groups"] = groups;
    if (activation) ctx->saved_data["activation"] = std::string(*activation);
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor bias = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const OptionalTensor kept = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
    const auto stride = ctx->saved_data["stride"].toIntVector(), padding = ctx->saved_data["padding"].toIntVector(),
               dilation = ctx->saved_data["dilation"].toIntVector();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const auto name = ctx->saved_data.find("activation");
    const std::string text = name == ctx->saved_data.end() ? "" : name->second.toStringRef();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      bias.has_value() && ctx->needs_input_grad(2)};
    const auto call = [&]() -> torch::autograd::variable_list {
      auto [grad_input, grad_weight, grad_bias] =
          conv2d_backward_op().call(grads[0], saved[0], saved[1], bias, kept, stride, padding, dilation, groups,
                                    text.empty() ? Name() : Name(text), mask);
      return {grad_input, grad_weight, grad_bias, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    };
    if (at::GradMode::is_enabled()) return call();  // create_graph: through Autograd, whose formula is in reference.py
    at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  }
};

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation,
                       const OptionalTensor& packed) {
  if (at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad())))
    return Conv2dFunction::apply(input, weight, bias, stride, padding, dilation, groups, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  return conv2d_op().call(input, weight, bias, stride, padding, dilation, groups, activation, packed);
}

// Python's way in: None where no kernel takes these arguments.
py::object conv2d_entry(py::handle input, py::handle weight, py::handle bias, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                        py::handle activation, py::handle packed) {
  if (!plain(input) || !plain(weight) || !plain(bias)) return py::none();
  const Tensor &x = tensor_argument("conv2d", "input", input), &w = tensor_argument("conv2d", "weight", weight);
  const OptionalTensor b = optional_tensor_argument("conv2d", "bias", bias);
  const OptionalTensor panels = optional_tensor_argument("conv2d", "packed", packed);
  const Name name = optional_string_argument("conv2d", "activation", activation);
  if (!served(x) || !served(w) || !served(b)) return py::none();
  Tensor output;
  {
    py::gil_scoped_release no_gil;
    output = conv2d_op().call(x, w, b, stride, padding, dilation, groups, name, panels);
  }
  return wrap(std::move(output));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, int groups, "
      "str? activation=None, Tensor? packed=None) -> Tensor");
  m.def(
      "conv2d_train(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, "
      "int groups, str? activation) -> (Tensor, Tensor)");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? saved, int[2] stride, "
      "int[4] padding, int[2] dilation, int groups, str? activation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def("conv2d_pack(Tensor weight, int groups, bool channels_last, str? algorithm=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("conv2d", conv2d_cpu);
  m.impl("conv2d_train", conv2d_train_cpu);
  m.impl("conv2d_backward", conv2d_backward_cpu);
  m.impl("conv2d_pack", conv2d_pack_cpu);
}
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("conv2d", conv2d_autograd); }

void bind_conv2d(py::module_& m) {
  m.def("conv2d", conv2d_entry, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("activation") = py::none(),
        py::arg("packed") = py::none());
  m.def("_conv2d_packed_shape",
        [](const std::vector<int64_t>& weight, bool is_double, int64_t groups, bool channels_last, Name algorithm) {
          const DType dtype = is_double ? DType::Float64 : DType::Float32;
          return packed_shape(pack_params(weight, dtype, groups, channels_last, algorithm));
        });
  m.def(
      "_conv2d_algorithm",
      [](const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups, bool frozen) {
        const Problem q = check(input, weight, std::nullopt, stride, padding, dilation, groups);
        return kConv2dAlgorithmNames[static_cast<int>(choose(q.shape, *dtype_of(input), frozen))];
      },
      py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"), py::arg("frozen") = false, "The algorithm that a call would run.");
  m.def(
      "_force_conv2d_algorithm",
      [](Name name) { forced_algorithm = name ? std::optional(algorithm_of(*name)) : std::nullopt; },
      py::arg("name").none(true), "Force an algorithm where it fits, None for the rule (tests).");
  m.def(
      "_conv2d_winograd",
      [](const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) -> const char* {
        if (!served(input) || !served(weight)) return nullptr;
        const Problem q = check(input, weight, std::nullopt, stride, padding, dilation, groups);
        const Conv2dAlgorithm a = choose(q.shape, *dtype_of(input), true);
        return is_winograd(a) ? kConv2dAlgorithmNames[static_cast<int>(a)] : nullptr;
      },
      "The name of Winograd's algorithm where a call with packed weights would run it, else None.");
  m.def("winograd", [] { return winograd_allowed.load(); }, "See fastnn.backends.");
  m.def("set_winograd", [](bool allowed) { winograd_allowed = allowed; }, py::arg("allowed"));
}

}  // namespace fastnn::bindings

// The autograd of fastnn::conv2d: its backward is the op fastnn::conv2d_backward.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/conv2d.h"

namespace fastnn::bindings {
namespace {

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
  static constexpr bool is_traceable = true;  // by compiled autograd: the backward is one op

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

}  // namespace

Tensor call_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation,
                   const OptionalTensor& packed) {
  return conv2d_op().call(input, weight, bias, stride, padding, dilation, groups, activation, packed);
}

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("conv2d", conv2d_autograd); }

}  // namespace fastnn::bindings

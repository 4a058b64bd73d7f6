// fastnn::linear and its backward: check, allocate, fill the params, call the kernels.
#include "fastnn/linear.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/checks.h"
#include "bindings/cuda.h"

namespace fastnn::bindings {
namespace {

using Name = std::optional<std::string_view>;

// input as a matrix, the shape of the output, and the problem's sizes.
struct Problem {
  Tensor input;         // [M, K]
  Tensor weight;        // [N, K]
  OptionalTensor bias;  // [N], contiguous
  std::vector<int64_t> output_shape;
  int64_t M, N, K;
};

Problem check(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(input.dim() >= 1, "fastnn.linear: input must have at least one dimension; got a scalar.");
  TORCH_CHECK(weight.dim() == 1 || weight.dim() == 2,
              "fastnn.linear: weight must be [out_features, in_features] or [in_features]; got ", weight.sizes(), ".");
  check_same("linear", "weight", weight, input, "input");
  const int64_t K = weight.size(-1), N = weight.dim() == 2 ? weight.size(0) : 1;
  TORCH_CHECK(input.size(-1) == K, "fastnn.linear: input must have in_features = ", K, " (weight is ", weight.sizes(),
              ") as its last dimension; got ", input.sizes(), ".");
  Problem p;
  p.K = K, p.N = N;
  p.output_shape = input.sizes().vec();
  p.output_shape.pop_back();
  p.M = 1;
  for (const int64_t size : p.output_shape) p.M *= size;
  if (weight.dim() == 2) p.output_shape.push_back(N);
  p.input = input.dim() == 2 ? input : input.reshape({p.M, K});
  p.weight = weight.dim() == 2 ? weight : weight.unsqueeze(0);
  if (bias && bias->defined()) {
    check_same("linear", "bias", *bias, input, "input");
    TORCH_CHECK(bias->dim() <= 1 && (bias->numel() == N || bias->numel() == 1),
                "fastnn.linear: bias must be [out_features] = [", N, "]; got ", bias->sizes(), ".");
    p.bias = bias->numel() == N ? bias->contiguous() : bias->expand({N}).contiguous();
  }
  return p;
}

std::optional<LinearAlgorithm> forced_algorithm;  // by tests

// The rule, or what a test forces where it fits. frozen: the weight may be packed before the call.
LinearAlgorithm choose(const Problem& q, bool frozen) {
  const LinearChoice choice =
      linear_choice(q.N, q.K, q.input.stride(1), q.weight.stride(0), q.weight.stride(1), frozen);
  if (!forced_algorithm) return linear_algorithm(*dtype_of(q.input), q.M, q.N, q.K, choice);
  return choice.fits(*forced_algorithm) ? *forced_algorithm : LinearAlgorithm::Gemm;
}

void check_packed(const Tensor& packed, const Tensor& weight, int64_t N, int64_t K) {
  const int64_t size = cpu::linear_packed_size(*dtype_of(weight), N, K);
  TORCH_CHECK(packed.numel() == size,
              "fastnn.linear: packed must be what linear_pack made of this weight under this ISA (", size,
              " elements); got ", packed.numel(), ".");
}

// torch.backends.cuda.matmul.fp32_precision, or allow_tf32 or set_float32_matmul_precision, which set it too.
bool allow_tf32(const Tensor& input) {
  return on_cuda(input) && at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                               at::Float32Precision::TF32;
}

// The kernels of the device that the tensors are on.
void run(const Tensor& input, const LinearForward& p) {
  if constexpr (kCuda)
    if (on_cuda(input))
      return call_cuda("linear", input, [&](auto... where) { return cuda::linear_forward(p, where...); });
  cpu::linear_forward(p);
}
void run(const Tensor& input, const LinearBackward& p) {
  if constexpr (kCuda)
    if (on_cuda(input))
      return call_cuda("linear_backward", input, [&](auto... where) { return cuda::linear_backward(p, where...); });
  cpu::linear_backward(p);
}

Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Name activation,
               const OptionalTensor& packed, Tensor* preactivation) {
  const Problem q = check(input, weight, bias);
  Tensor output = at::empty(q.output_shape, input.options());
  LinearForward p;
  p.activation = activation_of("linear", activation);
  p.dtype = *dtype_of(input);
  p.M = q.M, p.N = q.N, p.K = q.K;
  p.input = q.input.const_data_ptr();
  p.input_row = q.input.stride(0), p.input_col = q.input.stride(1);
  p.weight = q.weight.const_data_ptr();
  p.weight_row = q.weight.stride(0), p.weight_col = q.weight.stride(1);
  p.packed = nullptr;
  if (packed) {
    check_packed(*packed, weight, p.N, p.K);
    p.packed = packed->const_data_ptr();
  }
  p.algorithm = choose(q, packed.has_value());
  p.bias = q.bias ? q.bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  if (preactivation) *preactivation = at::empty(q.output_shape, input.options());
  p.preactivation = preactivation ? preactivation->mutable_data_ptr() : nullptr;
  p.threads = num_threads();
  p.allow_tf32 = allow_tf32(input);
  if (output.numel() > 0) run(input, p);
  return output;
}

Tensor linear_kernel(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Name activation,
                     const OptionalTensor& packed) {
  return forward(input, weight, bias, activation, packed, nullptr);
}

std::tuple<Tensor, Tensor> linear_train_kernel(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                               Name activation) {
  Tensor preactivation;
  Tensor output = forward(input, weight, bias, activation, std::nullopt, &preactivation);
  return {std::move(output), std::move(preactivation)};
}

// A matrix [K, N] that came as weight by its transpose: a product, not a layer.
bool transposed(const Tensor& weight) {
  return weight.dim() == 2 && !weight.is_contiguous() && weight.t().is_contiguous();
}

// input @ weight.T of two matrices into a contiguous one.
void product(const Tensor& input, const Tensor& weight, const Tensor& output) {
  LinearForward p;
  p.activation = Activation::None;
  p.dtype = *dtype_of(input);
  p.M = input.size(0), p.N = weight.size(0), p.K = input.size(1);
  p.input = input.const_data_ptr();
  p.input_row = input.stride(0), p.input_col = input.stride(1);
  p.weight = weight.const_data_ptr();
  p.weight_row = weight.stride(0), p.weight_col = weight.stride(1);
  p.packed = p.bias = nullptr;
  p.output = output.mutable_data_ptr();
  p.preactivation = nullptr;
  p.algorithm =
      linear_algorithm(p.dtype, p.M, p.N, p.K, linear_choice(p.N, p.K, p.input_col, p.weight_row, p.weight_col, false));
  p.threads = num_threads();
  p.allow_tf32 = allow_tf32(input);
  if (output.numel() > 0) run(input, p);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_kernel(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& weight, const OptionalTensor& bias,
                                                          const OptionalTensor& saved, Name activation,
                                                          std::array<bool, 3> output_mask) {
  const Problem q = check(input, weight, bias);
  LinearBackward p;
  p.activation = activation_of("linear_backward", activation);
  p.dtype = *dtype_of(input);
  p.M = q.M, p.N = q.N, p.K = q.K;
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(q.output_shape), "fastnn.linear_backward: grad_output must be ",
              at::IntArrayRef(q.output_shape), "; got ", grad_output.sizes(), ".");
  check_same("linear_backward", "grad_output", grad_output, input, "input");
  Tensor grad = grad_output.reshape({q.M, q.N});
  Tensor kept;
  if (p.activation != Activation::None) {
    TORCH_CHECK(saved && saved->defined() && saved->numel() == q.M * q.N,
                "fastnn.linear_backward: saved must hold the output or pre-activation of the forward.");
    kept = saved->contiguous();
    if (grad.stride(1) != 1) grad = grad.contiguous();
  }
  p.grad_output = grad.const_data_ptr();
  p.grad_row = grad.stride(0), p.grad_col = grad.stride(1);
  p.saved = kept.defined() ? kept.const_data_ptr() : nullptr;
  p.input = q.input.const_data_ptr();
  p.input_row = q.input.stride(0), p.input_col = q.input.stride(1);
  p.weight = q.weight.const_data_ptr();
  p.weight_row = q.weight.stride(0), p.weight_col = q.weight.stride(1);
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = at::empty(input.sizes(), input.options());
  if (p.activation == Activation::None && transposed(weight)) {
    // Its gradients are two linears: dX = G W, Wᵀ being what lies in memory, and dWᵀ = Xᵀ G, laid out as the weight, for
    // autograd would copy another layout.
    if (output_mask[0]) product(grad, q.weight.t(), grad_input);
    if (output_mask[1]) {
      const Tensor laid_out = at::empty({q.K, q.N}, q.weight.options());
      product(q.input.t(), grad.t(), laid_out);
      grad_weight = laid_out.t();
    }
    output_mask[0] = output_mask[1] = false;
  } else if (output_mask[1]) {
    grad_weight = at::empty(weight.sizes(), weight.options());
  }
  if (output_mask[2]) grad_bias = at::empty({q.N}, weight.options());
  p.grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_weight = output_mask[1] ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = output_mask[2] ? grad_bias.mutable_data_ptr() : nullptr;
  p.threads = num_threads();
  p.allow_tf32 = allow_tf32(input);
  run(input, p);
  if (grad_bias.defined() && bias && bias->sizes() != grad_bias.sizes()) {  // a bias of one element was broadcast
    grad_bias = bias->numel() == q.N ? grad_bias.reshape(bias->sizes()) : grad_bias.sum().reshape(bias->sizes());
  }
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

Tensor linear_pack_cpu(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && dtype_of(weight),
              "fastnn.linear_pack: weight must be [out_features, in_features] of "
              "float32, float64, bfloat16 or float16; got ",
              weight.scalar_type(), " ", weight.sizes(), ".");
  LinearPack p;
  p.dtype = *dtype_of(weight);
  p.N = weight.size(0), p.K = weight.size(1);
  Tensor packed = at::empty({cpu::linear_packed_size(p.dtype, p.N, p.K)},
                            weight.options().dtype(p.dtype == DType::Float64 ? at::kDouble : at::kFloat));
  p.weight = weight.const_data_ptr();
  p.weight_row = weight.stride(0), p.weight_col = weight.stride(1);
  p.packed = packed.mutable_data_ptr();
  p.threads = num_threads();
  cpu::linear_pack(p);
  return packed;
}

// ---- autograd ------------------------------------------------------------------------------------------------------

const auto& linear_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastnn::linear", "").typed<decltype(linear_kernel)>();
  return op;
}
const auto& linear_train_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastnn::linear_train", "").typed<decltype(linear_train_kernel)>();
  return op;
}
const auto& linear_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::linear_backward", "")
                             .typed<decltype(linear_backward_kernel)>();
  return op;
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd: the backward is one op

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, Name activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Activation a = activation_of("linear", activation);
    Tensor output, saved;
    if (activation_from_output(a)) {
      output = linear_op().call(input, weight, bias, activation, std::nullopt);
      if (a != Activation::None) saved = output;
    } else {
      std::tie(output, saved) = linear_train_op().call(input, weight, bias, activation);
    }
    ctx->save_for_backward({input, weight, bias.value_or(Tensor()), saved});
    if (activation) ctx->saved_data["activation"] = std::string(*activation);
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor bias = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const OptionalTensor kept = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
    const auto name = ctx->saved_data.find("activation");
    const std::string text = name == ctx->saved_data.end() ? "" : name->second.toStringRef();
    const Name activation = text.empty() ? Name() : Name(text);
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      bias.has_value() && ctx->needs_input_grad(2)};
    const auto call = [&] {
      return linear_backward_op().call(grads[0], saved[0], saved[1], bias, kept, activation, mask);
    };
    if (at::GradMode::is_enabled()) {  // create_graph: through Autograd, whose formula is in reference.py
      auto [grad_input, grad_weight, grad_bias] = call();
      return {grad_input, grad_weight, grad_bias, Tensor()};
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_input, grad_weight, grad_bias] = call();
    return {grad_input, grad_weight, grad_bias, Tensor()};
  }
};

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Name activation,
                       const OptionalTensor& packed) {
  if (at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad())))
    return LinearFunction::apply(input, weight, bias, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_op().call(input, weight, bias, activation, packed);
}

// Python's way in: None where no kernel takes these arguments.
py::object linear_entry(py::handle input, py::handle weight, py::handle bias, py::handle activation,
                        py::handle packed) {
  if (!plain(input) || !plain(weight) || !plain(bias)) return py::none();
  const Tensor &x = tensor_argument("linear", "input", input), &w = tensor_argument("linear", "weight", weight);
  const OptionalTensor b = optional_tensor_argument("linear", "bias", bias);
  const OptionalTensor panels = optional_tensor_argument("linear", "packed", packed);
  const Name name = optional_string_argument("linear", "activation", activation);
  if (!served_on_cuda(x) || !served_on_cuda(w) || !served_on_cuda(b) || (b && b->dim() > 1)) return py::none();
  Tensor output;
  {
    py::gil_scoped_release no_gil;
    output = linear_op().call(x, w, b, name, panels);
  }
  return wrap(std::move(output));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, str? activation=None, Tensor? packed=None) -> Tensor");
  m.def("linear_train(Tensor input, Tensor weight, Tensor? bias, str? activation) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? saved, str? activation, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def("linear_pack(Tensor weight) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear", linear_kernel);
  m.impl("linear_train", linear_train_kernel);
  m.impl("linear_backward", linear_backward_kernel);
  m.impl("linear_pack", linear_pack_cpu);
}
#ifdef FASTNN_CUDA
TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("linear", linear_kernel);
  m.impl("linear_train", linear_train_kernel);
  m.impl("linear_backward", linear_backward_kernel);
}
#endif
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("linear", linear_autograd); }

void bind_linear(py::module_& m) {
  m.def("linear", linear_entry, py::arg("input"), py::arg("weight"), py::arg("bias") = py::none(),
        py::arg("activation") = py::none(), py::arg("packed") = py::none());
  m.def(
      "_linear_algorithm",
      [](const Tensor& input, const Tensor& weight, bool frozen) {
        return kLinearAlgorithmNames[static_cast<int>(choose(check(input, weight, std::nullopt), frozen))];
      },
      py::arg("input"), py::arg("weight"), py::arg("frozen") = false, "The algorithm that a call would run.");
  m.def(
      "_linear_packs",
      [](py::handle input, py::handle weight) {
        if (!plain(input) || !plain(weight)) return false;
        const Tensor &x = tensor_argument("linear", "input", input), &w = tensor_argument("linear", "weight", weight);
        return served(x) && served(w) &&
               choose(check(cast_alike(x, w), w, std::nullopt), true) == LinearAlgorithm::Packed;
      },
      py::arg("input"), py::arg("weight"), "Whether a call with frozen weights would read packed ones.");
  m.def(
      "_force_linear_algorithm",
      [](Name name) {
        forced_algorithm =
            name ? std::optional(algorithm_of<LinearAlgorithm>("linear", kLinearAlgorithmNames, *name)) : std::nullopt;
      },
      py::arg("name").none(true), "Force an algorithm where it fits, None for the rule (tests).");
  m.def("_linear_packed_size", [](int64_t N, int64_t K, bool is_double) {
    return cpu::linear_packed_size(is_double ? DType::Float64 : DType::Float32, N, K);
  });
}

}  // namespace fastnn::bindings

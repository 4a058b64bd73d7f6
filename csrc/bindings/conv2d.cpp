// fastnn::conv2d and its backward: allocate, fill the params, call the kernels.
#include "bindings/conv2d.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "fastnn/linear.h"

namespace fastnn::bindings {
namespace {

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

void linear_forward(const Conv2dParams& p) {
  const Conv2dShape& s = p.shape;
  LinearForward q{};
  q.dtype = p.dtype, q.activation = p.activation;
  q.M = s.N, q.N = s.K, q.K = s.C * s.R * s.S;
  q.algorithm = linear_algorithm(q.dtype, q.M, q.N, q.K, linear_choice(q.N, q.K, 1, q.K, 1, false));
  q.input = p.input, q.input_row = q.K, q.input_col = 1;
  q.weight = p.weight, q.weight_row = q.K, q.weight_col = 1;
  q.bias = p.bias, q.output = p.output, q.preactivation = p.pre_activation;
  q.threads = p.threads;
  cpu::linear_forward(q);
}

void linear_backward(const Conv2dBackwardParams& p) {
  const Conv2dShape& s = p.shape;
  LinearBackward q{};
  q.dtype = p.dtype, q.activation = p.activation;
  q.M = s.N, q.N = s.K, q.K = s.C * s.R * s.S;
  q.grad_output = p.grad_output, q.grad_row = q.N, q.grad_col = 1, q.saved = p.saved;
  q.input = p.input, q.input_row = q.K, q.input_col = 1;
  q.weight = p.weight, q.weight_row = q.K, q.weight_col = 1;
  q.grad_input = p.grad_input, q.grad_weight = p.grad_weight, q.grad_bias = p.grad_bias;
  q.threads = p.threads;
  cpu::linear_backward(q);
}

Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups, Name activation, const OptionalTensor& packed,
               Tensor* pre_activation) {
  const Conv2dProblem q = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
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
    p.algorithm = choose(q, weight, true);
    if (packed->sizes() == IntArrayRef(packed_shape(p))) p.packed = packed->const_data_ptr();
  }
  if (!p.packed) {
    p.algorithm = choose(q, weight, false);
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
  if (output.numel() > 0) p.algorithm == Conv2dAlgorithm::Linear ? linear_forward(p) : cpu::conv2d_forward(p);
  return q.batched ? output : output.squeeze(0);
}

}  // namespace

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
  const Conv2dProblem q = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  const Activation f = activation_of("conv2d_backward", activation);
  Tensor grad = q.batched ? grad_output : grad_output.unsqueeze(0);
  TORCH_CHECK(grad.sizes() == IntArrayRef(q.output_shape), "fastnn.conv2d_backward: grad_output must be ",
              IntArrayRef(q.output_shape), "; got ", grad_output.sizes(), ".");
  check_same("conv2d_backward", "grad_output", grad_output, input, "input");
  grad = grad.contiguous(q.format);
  Tensor kept;
  if (f != Activation::None) {
    TORCH_CHECK(saved && saved->defined() && saved->numel() == grad.numel(),
                "fastnn.conv2d_backward: saved must hold the output or pre-activation of the forward.");
    kept = (q.batched ? *saved : saved->unsqueeze(0)).contiguous(q.format);
  }
  Conv2dBackwardParams p{};
  p.dtype = *dtype_of(input);
  p.shape = q.shape;
  p.algorithm = p.input_algorithm = choose(q.shape, false, false);
  const Conv2dAlgorithm transposed = choose(q.shape.transposed(), winograd_suits(p.dtype), false);
  if (q.shape.winograd() && is_winograd(transposed)) p.input_algorithm = transposed;
  const bool linear = choose(q, weight, false) == Conv2dAlgorithm::Linear;
  p.activation = f;
  p.grad_output = grad.const_data_ptr();
  if (kept.defined()) p.saved = kept.const_data_ptr();
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
    linear ? linear_backward(p) : cpu::conv2d_backward(p);
  }
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

namespace {

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

// Stride, padding and dilation as Python gave them, where they are of the plain kinds: an int, or a tuple or list of ints,
// two or, for the padding, the four sides.
struct Geometry {
  std::array<int64_t, 2> stride, dilation;
  std::array<int64_t, 4> padding;
};

template <size_t SIDES>
bool read_sides(py::handle h, std::array<int64_t, SIDES>& to) {
  PyObject* given = h.ptr();
  PyObject** items = &given;
  Py_ssize_t count = 1;
  if (PyTuple_CheckExact(given) || PyList_CheckExact(given)) {
    items = PySequence_Fast_ITEMS(given), count = PySequence_Fast_GET_SIZE(given);
    if (count != 2 && count != static_cast<Py_ssize_t>(SIDES)) return false;
  }
  for (size_t i = 0; i < SIDES; ++i) {
    PyObject* const item = items[i * count / SIDES];
    int overflow = 0;
    if (!PyLong_CheckExact(item)) return false;
    to[i] = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow) return false;
  }
  return true;
}

std::optional<Geometry> read_geometry(py::handle stride, py::handle padding, py::handle dilation) {
  Geometry g;
  if (!read_sides(stride, g.stride) || !read_sides(padding, g.padding) || !read_sides(dilation, g.dilation))
    return std::nullopt;
  return g;
}

// Python's way in: None where no kernel takes these arguments, or not in this form.
py::object conv2d_entry(py::handle input, py::handle weight, py::handle bias, py::handle stride, py::handle padding,
                        py::handle dilation, int64_t groups, py::handle activation, py::handle packed) {
  if (!plain(input) || !plain(weight) || !plain(bias)) return py::none();
  const Tensor &x = tensor_argument("conv2d", "input", input), &w = tensor_argument("conv2d", "weight", weight);
  const OptionalTensor b = optional_tensor_argument("conv2d", "bias", bias);
  const OptionalTensor panels = optional_tensor_argument("conv2d", "packed", packed);
  const Name name = optional_string_argument("conv2d", "activation", activation);
  if (!served(x) || !served(w) || !served(b)) return py::none();
  const auto g = read_geometry(stride, padding, dilation);
  if (!g) return py::none();
  Tensor output;
  {
    py::gil_scoped_release no_gil;
    output = call_conv2d(x, w, b, g->stride, g->padding, g->dilation, groups, name, panels);
  }
  return wrap(std::move(output));
}

// What conv2d_pack takes beside the weight, for the call that these arguments make: groups, channels_last, algorithm.
// None where the call would not read packed weights.
py::object conv2d_packing(py::handle input, py::handle weight, py::handle stride, py::handle padding,
                          py::handle dilation, int64_t groups) {
  if (!plain(input) || !plain(weight)) return py::none();
  const Tensor &x = tensor_argument("conv2d", "input", input), &w = tensor_argument("conv2d", "weight", weight);
  const auto g = read_geometry(stride, padding, dilation);
  if (!served(x) || !served(w) || !g) return py::none();
  const Conv2dProblem q = check_conv2d(cast_alike(x, w), w, std::nullopt, g->stride, g->padding, g->dilation, groups);
  const Conv2dAlgorithm a = choose(q, w, true);
  if (a == Conv2dAlgorithm::Linear) return py::none();
  const char* const name = is_winograd(a) ? kConv2dAlgorithmNames[static_cast<int>(a)] : nullptr;
  return py::make_tuple(groups, q.shape.channels_last, name);
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
        const Conv2dProblem q = check_conv2d(input, weight, std::nullopt, stride, padding, dilation, groups);
        return kConv2dAlgorithmNames[static_cast<int>(choose(q, weight, frozen))];
      },
      py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"), py::arg("frozen") = false, "The algorithm that a call would run.");
  m.def(
      "_force_conv2d_algorithm",
      [](Name name) { forced_conv2d = name ? std::optional(conv2d_algorithm_named(*name)) : std::nullopt; },
      py::arg("name").none(true), "Force an algorithm where it fits, None for the rule (tests).");
  m.def("_conv2d_packing", conv2d_packing, py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"));
  m.def("winograd", [] { return winograd_allowed.load(); }, "See fastnn.backends.");
  m.def("set_winograd", [](bool allowed) { winograd_allowed = allowed; }, py::arg("allowed"));
}

}  // namespace fastnn::bindings

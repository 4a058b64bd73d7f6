// fastnn::rnn, one layer over a whole sequence, and its backward: check, allocate, fill the params, call the kernels.
#include "fastnn/rnn.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/checks.h"

namespace fastnn::bindings {
namespace {

using Tensors = std::vector<Tensor>;
using Mode = std::string_view;

// Contiguous arguments, kept alive, and the sizes.
struct Problem {
  RnnParams params;
  Tensors held;
  int gates, reserved, each;     // `each`: weights of one direction
  bool step, biased, projected;  // step: input is [B, I], one step of a cell
  std::vector<int64_t> output_shape;

  const void* hold(const Tensor& t) {
    held.push_back(t.contiguous());
    return held.back().const_data_ptr();
  }
};

void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& input) {
  check_same("rnn", name, t, input, "input");
  TORCH_CHECK(t.sizes() == shape, "fastnn.rnn: ", name, " must be ", shape, "; got ", t.sizes(), ".");
}

Problem check(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx, const OptionalTensor& cx,
              at::TensorList weights, Mode mode) {
  Problem q;
  RnnParams& p = q.params;
  const RnnModeRow* row = nullptr;
  for (const RnnModeRow& known : kRnnModes)
    if (mode == known.name) row = &known;
  TORCH_CHECK_VALUE(row, "fastnn.rnn: mode must be one of RNN_TANH, RNN_RELU, LSTM, GRU; got '", std::string(mode),
                    "'.");
  p.mode = row->mode, q.gates = row->gates, q.reserved = row->reserved;
  const bool packed = batch_sizes && batch_sizes->defined(), lstm = p.mode == RnnMode::Lstm;
  TORCH_CHECK(input.dim() == 2 || (input.dim() == 3 && !packed),
              "fastnn.rnn: input must be [steps, batch, input_size], "
              "[batch, input_size] for one step, or [rows, input_size] with batch_sizes; got ",
              input.sizes(), ".");
  const std::optional<DType> dtype = dtype_of(input);
  TORCH_CHECK(dtype, "fastnn.rnn: input must be float32, float64, bfloat16 or float16; got ", input.scalar_type(), ".");
  q.step = input.dim() == 2 && !packed;
  TORCH_CHECK(hx.dim() == (q.step ? 2 : 3), "fastnn.rnn: hx must be ", q.step ? "[batch" : "[directions, batch",
              ", state_size]; got ", hx.sizes(), ".");
  p.dtype = *dtype, p.threads = num_threads();
  p.directions = q.step ? 1 : static_cast<int>(hx.size(0));
  TORCH_CHECK(p.directions == 1 || p.directions == 2, "fastnn.rnn: hx must have 1 or 2 directions; got ", hx.sizes(),
              ".");
  q.each = static_cast<int>(weights.size()) / p.directions;
  TORCH_CHECK(weights.size() % p.directions == 0 && q.each >= 2 && q.each <= 5,
              "fastnn.rnn: weights must be weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] for each of ",
              p.directions, " directions; got ", weights.size(), " tensors.");
  q.biased = q.each >= 4, q.projected = q.each % 2 == 1;
  TORCH_CHECK(!q.projected || lstm, "fastnn.rnn: weights must not hold weight_hr (proj_size) unless mode is LSTM.");
  TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % q.gates == 0, "fastnn.rnn: weight_ih must be [", q.gates,
              " * hidden_size, input_size]; got ", weights[0].sizes(), ".");
  p.input_size = weights[0].size(1), p.hidden_size = weights[0].size(0) / q.gates;
  p.state_size = q.projected ? weights[q.each - 1].size(0) : p.hidden_size;
  TORCH_CHECK(input.size(-1) == p.input_size, "fastnn.rnn: input must have input_size = ", p.input_size,
              " (weight_ih is ", weights[0].sizes(), ") as its last dimension; got ", input.sizes(), ".");

  p.steps = q.step ? 1 : input.size(0), p.batch = input.size(-2);
  if (packed) {
    TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(),
                "fastnn.rnn: batch_sizes must be a one-dimensional int64 tensor on the CPU; got ",
                batch_sizes->scalar_type(), " ", batch_sizes->sizes(), " on ", batch_sizes->device(), ".");
    p.batch_sizes = static_cast<const int64_t*>(q.hold(*batch_sizes));
    p.steps = batch_sizes->numel(), p.batch = p.steps ? p.batch_sizes[0] : 0;
    int64_t rows = 0, least = 1;
    for (int64_t t = 0, last = p.batch; t < p.steps; last = p.batch_sizes[t++]) {
      least = p.batch_sizes[t] > last ? 0 : std::min(least, p.batch_sizes[t]);
      rows += p.batch_sizes[t];
    }
    TORCH_CHECK(least >= 1 && rows == input.size(0),
                "fastnn.rnn: batch_sizes must be positive, not increasing, and sum to "
                "the rows of input (",
                input.size(0), "); got a sum of ", rows, ".");
  }
  TORCH_CHECK(p.steps > 0, "fastnn.rnn: input must have a sequence length larger than 0; got ", input.sizes(), ".");
  p.rows = packed ? input.size(0) : p.steps * p.batch;
  const int64_t I = p.input_size, H = p.hidden_size, P = p.state_size, B = p.batch, D = p.directions;

  const auto shape = [&](int64_t size) {
    return q.step ? std::vector<int64_t>{B, size} : std::vector<int64_t>{D, B, size};
  };
  check_shape("hx", hx, shape(P), input);
  p.hx = q.hold(hx);
  TORCH_CHECK(lstm == (cx && cx->defined()), "fastnn.rnn: cx must be given for LSTM and for no other mode.");
  if (lstm) {
    check_shape("cx", *cx, shape(H), input);
    p.cx = q.hold(*cx);
  }
  for (int64_t d = 0; d < D; ++d) {
    const at::TensorList w = weights.slice(d * q.each, q.each);
    check_shape("weight_ih", w[0], {q.gates * H, I}, input);
    check_shape("weight_hh", w[1], {q.gates * H, P}, input);
    p.weights[d].weight_ih = q.hold(w[0]), p.weights[d].weight_hh = q.hold(w[1]);
    if (q.biased) {
      check_shape("bias_ih", w[2], {q.gates * H}, input);
      check_shape("bias_hh", w[3], {q.gates * H}, input);
      p.weights[d].bias_ih = q.hold(w[2]), p.weights[d].bias_hh = q.hold(w[3]);
    }
    if (q.projected) {
      check_shape("weight_hr", w[q.each - 1], {P, H}, input);
      p.weights[d].weight_hr = q.hold(w[q.each - 1]);
    }
  }
  q.held.push_back(input.stride(-1) == 1 || I == 1 ? input : input.contiguous());
  const Tensor& x = q.held.back();
  p.input = x.const_data_ptr();
  p.stride_step = input.dim() == 3 ? x.stride(0) : 0, p.stride_batch = x.stride(-2);
  q.output_shape = input.sizes().vec();
  q.output_shape.back() = D * P;
  return q;
}

Tensor compute_empty(at::IntArrayRef shape, const Tensor& input) {
  return at::empty(shape, input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx,
                                           const OptionalTensor& cx, at::TensorList weights, Mode mode,
                                           Tensor* reserve) {
  Problem q = check(input, batch_sizes, hx, cx, weights, mode);
  RnnParams& p = q.params;
  Tensor output = at::empty(q.output_shape, input.options());
  Tensor h_n = q.step ? at::empty({0}, input.options()) : at::empty(hx.sizes(), input.options());
  Tensor c_n = p.cx ? at::empty(cx->sizes(), input.options()) : at::empty({0}, input.options());
  p.output = output.mutable_data_ptr();
  p.h_n = q.step ? nullptr : h_n.mutable_data_ptr();
  p.c_n = p.cx ? c_n.mutable_data_ptr() : nullptr;
  if (reserve) {
    *reserve = compute_empty({p.directions, p.rows, q.reserved * p.hidden_size}, input);
    p.reserve = reserve->mutable_data_ptr();
  }
  if (p.batch > 0) cpu::rnn_forward(p);
  return {std::move(output), std::move(h_n), std::move(c_n)};
}

std::tuple<Tensor, Tensor, Tensor> rnn_cpu(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx,
                                           const OptionalTensor& cx, at::TensorList weights, Mode mode) {
  return forward(input, batch_sizes, hx, cx, weights, mode, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_train_cpu(const Tensor& input, const OptionalTensor& batch_sizes,
                                                         const Tensor& hx, const OptionalTensor& cx,
                                                         at::TensorList weights, Mode mode) {
  Tensor reserve;
  auto [output, h_n, c_n] = forward(input, batch_sizes, hx, cx, weights, mode, &reserve);
  return {std::move(output), std::move(h_n), std::move(c_n), std::move(reserve)};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> rnn_backward_cpu(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx, const OptionalTensor& cx,
    at::TensorList weights, const Tensor& output, const Tensor& reserve, Mode mode, std::array<bool, 4> output_mask) {
  Problem q = check(input, batch_sizes, hx, cx, weights, mode);
  RnnBackwardParams b{q.params};
  const RnnParams& p = b.forward;
  const auto gradient = [&](const char* name, const OptionalTensor& t, at::IntArrayRef shape) -> const void* {
    if (!t || !t->defined()) return nullptr;
    check_shape(name, *t, shape, input);
    return q.hold(*t);
  };
  b.grad_output = gradient("grad_output", grad_output, q.output_shape);
  if (!q.step) b.grad_h_n = gradient("grad_h_n", grad_h_n, hx.sizes());
  if (p.cx) b.grad_c_n = gradient("grad_c_n", grad_c_n, cx->sizes());
  check_shape("output", output, q.output_shape, input);
  TORCH_CHECK(reserve.numel() == p.directions * p.rows * q.reserved * p.hidden_size,
              "fastnn.rnn: reserve must be what rnn_train returned; got ", reserve.sizes(), ".");
  b.forward.output = const_cast<void*>(q.hold(output));
  b.forward.reserve = const_cast<void*>(q.hold(reserve));
  Tensor grad_input, grad_hx, grad_cx;
  Tensors grad_weights;
  if (output_mask[0]) grad_input = at::empty(input.sizes(), input.options());
  if (output_mask[1]) grad_hx = at::empty(hx.sizes(), hx.options());
  if (output_mask[2] && p.cx) grad_cx = at::empty(cx->sizes(), cx->options());
  if (output_mask[3])
    for (const Tensor& w : weights) grad_weights.push_back(at::empty(w.sizes(), w.options()));
  b.grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr;
  b.grad_hx = output_mask[1] ? grad_hx.mutable_data_ptr() : nullptr;
  b.grad_cx = grad_cx.defined() ? grad_cx.mutable_data_ptr() : nullptr;
  for (int d = 0; d < p.directions && output_mask[3]; ++d) {
    auto& g = b.grad_weights[d];
    const auto at = [&](int i) { return grad_weights[d * q.each + i].mutable_data_ptr(); };
    g.weight_ih = at(0), g.weight_hh = at(1);
    if (q.biased) g.bias_ih = at(2), g.bias_hh = at(3);
    if (q.projected) g.weight_hr = at(q.each - 1);
  }
  cpu::rnn_backward(b);
  return {std::move(grad_input), std::move(grad_hx), std::move(grad_cx), std::move(grad_weights)};
}

// ---- autograd ------------------------------------------------------------------------------------------------------

template <class F>
auto typed(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
const auto& rnn_op() {
  static const auto op = typed<decltype(rnn_cpu)>("fastnn::rnn");
  return op;
}
const auto& rnn_train_op() {
  static const auto op = typed<decltype(rnn_train_cpu)>("fastnn::rnn_train");
  return op;
}
const auto& rnn_backward_op() {
  static const auto op = typed<decltype(rnn_backward_cpu)>("fastnn::rnn_backward");
  return op;
}

OptionalTensor defined_only(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct RnnFunction : torch::autograd::Function<RnnFunction> {
  static Tensors forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const OptionalTensor& batch_sizes,
                         const Tensor& hx, const OptionalTensor& cx, at::TensorList weights, Mode mode) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, h_n, c_n, reserve] = rnn_train_op().call(input, batch_sizes, hx, cx, weights, mode);
    Tensors saved = {input, batch_sizes.value_or(Tensor()), hx, cx.value_or(Tensor()), output, reserve};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["mode"] = std::string(mode);
    ctx->set_materialize_grads(false);
    Tensors empty;
    if (input.dim() == 2 && !(batch_sizes && batch_sizes->defined())) empty.push_back(h_n);
    if (!cx || !cx->defined()) empty.push_back(c_n);
    ctx->mark_non_differentiable(empty);
    return {output, h_n, c_n};
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensors weights(saved.begin() + 6, saved.end());
    Tensors result(5 + weights.size());
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    const OptionalTensor batch_sizes = defined_only(saved[1]), cx = defined_only(saved[3]);
    const size_t state = batch_sizes ? 2 : 1, first = state + (cx ? 2 : 1);  // edges: only of tensors that are there
    bool any = false;
    for (size_t i = 0; i < weights.size(); ++i) any |= ctx->needs_input_grad(first + i);
    const std::array<bool, 4> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(state),
                                      cx && ctx->needs_input_grad(state + 1), any};
    const std::string mode = ctx->saved_data["mode"].toStringRef();
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled())
      guard.emplace();  // create_graph: through Autograd, whose formula is in reference.py
    auto [grad_input, grad_hx, grad_cx, grad_weights] =
        rnn_backward_op().call(defined_only(grads[0]), defined_only(grads[1]), defined_only(grads[2]), saved[0],
                               batch_sizes, saved[2], cx, weights, saved[4], saved[5], mode, mask);
    result[0] = grad_input, result[2] = grad_hx, result[3] = grad_cx;
    for (size_t i = 0; i < grad_weights.size(); ++i) result[4 + i] = grad_weights[i];
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> rnn_autograd(const Tensor& input, const OptionalTensor& batch_sizes,
                                                const Tensor& hx, const OptionalTensor& cx, at::TensorList weights,
                                                Mode mode) {
  if (at::GradMode::is_enabled()) {
    bool wanted = input.requires_grad() || hx.requires_grad() || (cx && cx->requires_grad());
    for (const Tensor& w : weights) wanted |= w.requires_grad();
    if (wanted) {
      Tensors y = RnnFunction::apply(input, batch_sizes, hx, cx, weights, mode);
      return {std::move(y[0]), std::move(y[1]), std::move(y[2])};
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return rnn_op().call(input, batch_sizes, hx, cx, weights, mode);
}

// Python's way in: None where no kernel takes these arguments. A cell is one step: input [batch, input_size].
py::object rnn_entry(py::handle input, py::handle batch_sizes, py::handle hx, py::handle cx,
                     const py::sequence& weights, py::handle mode) {
  if (!plain(input) || !plain(hx) || !plain(cx)) return py::none();
  const Tensor &x = tensor_argument("rnn", "input", input), &h = tensor_argument("rnn", "hx", hx);
  const OptionalTensor sizes = optional_tensor_argument("rnn", "batch_sizes", batch_sizes);
  const OptionalTensor c = optional_tensor_argument("rnn", "cx", cx);
  if (!served(x) || !served(h) || !served(c)) return py::none();
  Tensors list;
  list.reserve(weights.size());
  for (const py::handle w : weights) {
    if (!plain(w)) return py::none();
    list.push_back(tensor_argument("rnn", "weights", w));
    if (!served(list.back())) return py::none();
  }
  const std::optional<Mode> name = optional_string_argument("rnn", "mode", mode);
  std::tuple<Tensor, Tensor, Tensor> y;
  {
    py::gil_scoped_release no_gil;
    y = rnn_op().call(x, sizes, h, c, list, name.value_or(""));
  }
  return py::make_tuple(wrap(std::get<0>(std::move(y))), wrap(std::get<1>(std::move(y))),
                        wrap(std::get<2>(std::move(y))));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "rnn(Tensor input, Tensor? batch_sizes, Tensor hx, Tensor? cx, Tensor[] weights, str mode) -> "
      "(Tensor output, Tensor h_n, Tensor c_n)");
  m.def(
      "rnn_train(Tensor input, Tensor? batch_sizes, Tensor hx, Tensor? cx, Tensor[] weights, str mode) -> "
      "(Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)");
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, "
      "Tensor hx, Tensor? cx, Tensor[] weights, Tensor output, Tensor reserve, str mode, bool[4] output_mask) -> "
      "(Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor[] grad_weights)");
}
TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("rnn", rnn_cpu);
  m.impl("rnn_train", rnn_train_cpu);
  m.impl("rnn_backward", rnn_backward_cpu);
}
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("rnn", rnn_autograd); }

void bind_rnn(py::module_& m) {
  m.def("rnn", rnn_entry, py::arg("input"), py::arg("batch_sizes"), py::arg("hx"), py::arg("cx"), py::arg("weights"),
        py::arg("mode"));
}

}  // namespace fastnn::bindings

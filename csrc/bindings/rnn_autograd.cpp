// fastnn::rnn above its kernels: schemas, the autograd Function, Python's way in.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/checks.h"
#include "fastnn/rnn.h"

namespace fastnn::bindings {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensorList = std::optional<at::TensorList>;
using Mode = std::string_view;

// The ops' signatures, as their schemas below give them.
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using OutputsAndReserve = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors>;
using Rnn = Outputs(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, at::TensorList, Mode,
                    OptionalTensorList, OptionalTensorList, const OptionalTensor&, double);
using RnnTrain = OutputsAndReserve(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                   at::TensorList, Mode, OptionalTensorList, const OptionalTensor&, double);
using RnnBackward = Gradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                              const OptionalTensor&, const Tensor&, const OptionalTensor&, at::TensorList,
                              const Tensor&, const Tensor&, Mode, OptionalTensorList, const OptionalTensor&, double,
                              std::array<bool, 4>);

template <class F>
auto typed(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
const auto& rnn_op() {
  static const auto op = typed<Rnn>("fastnn::rnn");
  return op;
}
const auto& rnn_train_op() {
  static const auto op = typed<RnnTrain>("fastnn::rnn_train");
  return op;
}
const auto& rnn_backward_op() {
  static const auto op = typed<RnnBackward>("fastnn::rnn_backward");
  return op;
}

// One step of a cell, whose output is its state: h_n is empty.
bool one_step(const Tensor& input, const OptionalTensor& batch_sizes) {
  return input.dim() == 2 && !(batch_sizes && batch_sizes->defined());
}

OptionalTensor defined_only(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

OptionalTensorList listed(at::TensorList norms) { return norms.empty() ? OptionalTensorList() : norms; }

struct RnnFunction : torch::autograd::Function<RnnFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd: the backward is one op

  static Tensors forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const OptionalTensor& batch_sizes,
                         const Tensor& hx, const OptionalTensor& cx, at::TensorList weights, at::TensorList norms,
                         const OptionalTensor& zoneout_mask, Mode mode, double zoneout) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, h_n, c_n, reserve] =
        rnn_train_op().call(input, batch_sizes, hx, cx, weights, mode, listed(norms), zoneout_mask, zoneout);
    Tensors saved = {input,   batch_sizes.value_or(Tensor()), hx, cx.value_or(Tensor()), output,
                     reserve, zoneout_mask.value_or(Tensor())};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), norms.begin(), norms.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["mode"] = std::string(mode);
    ctx->saved_data["norms"] = static_cast<int64_t>(norms.size());
    ctx->saved_data["zoneout"] = zoneout;
    ctx->set_materialize_grads(false);
    // Without those that are empty: marked as not differentiable, they would keep compiled autograd away.
    Tensors results = {output};
    if (!one_step(input, batch_sizes)) results.push_back(h_n);
    if (cx && cx->defined()) results.push_back(c_n);
    return results;
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors grads) {
    const auto saved = ctx->get_saved_variables();
    const auto first_norm = saved.end() - ctx->saved_data["norms"].toInt();
    const Tensors weights(saved.begin() + 7, first_norm), norms(first_norm, saved.end());
    Tensors result(7 + weights.size() + norms.size());
    const OptionalTensor batch_sizes = defined_only(saved[1]), cx = defined_only(saved[3]);
    const bool step = one_step(saved[0], batch_sizes);
    const OptionalTensor grad_output = defined_only(grads[0]), grad_h_n = step ? std::nullopt : defined_only(grads[1]),
                         grad_c_n = cx ? defined_only(grads.back()) : std::nullopt;
    if (!grad_output && !grad_h_n && !grad_c_n) return result;
    const size_t state = batch_sizes ? 2 : 1, first = state + (cx ? 2 : 1);  // edges: only of tensors that are there
    bool any = false;
    for (size_t i = 0; i < weights.size() + norms.size(); ++i) any |= ctx->needs_input_grad(first + i);
    const std::array<bool, 4> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(state),
                                      cx && ctx->needs_input_grad(state + 1), any};
    const std::string mode = ctx->saved_data["mode"].toStringRef();
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled())
      guard.emplace();  // create_graph: through Autograd, whose formula is in reference.py
    auto [grad_input, grad_hx, grad_cx, grad_weights, grad_norms] = rnn_backward_op().call(
        grad_output, grad_h_n, grad_c_n, saved[0], batch_sizes, saved[2], cx, weights, saved[4], saved[5], mode,
        listed(norms), defined_only(saved[6]), ctx->saved_data["zoneout"].toDouble(), mask);
    result[0] = grad_input, result[2] = grad_hx, result[3] = grad_cx;
    std::move(grad_weights.begin(), grad_weights.end(), result.begin() + 4);
    std::move(grad_norms.begin(), grad_norms.end(), result.begin() + 4 + weights.size());
    return result;
  }
};

// Where a gradient is wanted, training's forward computes from the weights themselves and ignores `packed`.
Outputs rnn_autograd(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx, const OptionalTensor& cx,
                     at::TensorList weights, Mode mode, OptionalTensorList packed, OptionalTensorList norms,
                     const OptionalTensor& zoneout_mask, double zoneout) {
  if (at::GradMode::is_enabled()) {
    bool wanted = input.requires_grad() || hx.requires_grad() || (cx && cx->requires_grad());
    const at::TensorList scales = norms.value_or(at::TensorList());
    for (const Tensor& w : weights) wanted |= w.requires_grad();
    for (const Tensor& w : scales) wanted |= w.requires_grad();
    if (wanted) {
      Tensors y = RnnFunction::apply(input, batch_sizes, hx, cx, weights, scales, zoneout_mask, mode, zoneout);
      const Tensor none = at::empty({0}, input.options());
      return {y[0], one_step(input, batch_sizes) ? none : y[1], cx && cx->defined() ? y.back() : none};
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return rnn_op().call(input, batch_sizes, hx, cx, weights, mode, packed, norms, zoneout_mask, zoneout);
}

// The tensors of a sequence; empty where no kernel takes one of them.
std::optional<Tensors> tensors_argument(const char* name, py::handle h) {
  if (!PySequence_Check(h.ptr()))
    throw py::type_error(std::string("fastnn.rnn: ") + name + " must be a sequence of Tensors; got " +
                         Py_TYPE(h.ptr())->tp_name + ".");
  const auto sequence = py::reinterpret_borrow<py::sequence>(h);
  Tensors list;
  list.reserve(sequence.size());
  for (const py::handle t : sequence) {
    if (!plain(t)) return std::nullopt;
    list.push_back(tensor_argument("rnn", name, t));
    if (!served(list.back())) return std::nullopt;
  }
  return list;
}

// Python's way in: None where no kernel takes these arguments. A cell is one step: input [batch, input_size].
py::object rnn_entry(py::handle input, py::handle batch_sizes, py::handle hx, py::handle cx, py::handle weights,
                     py::handle mode, py::handle packed, py::handle norms, py::handle zoneout_mask, double zoneout) {
  if (!plain(input) || !plain(hx) || !plain(cx) || !plain(zoneout_mask)) return py::none();
  const Tensor &x = tensor_argument("rnn", "input", input), &h = tensor_argument("rnn", "hx", hx);
  const OptionalTensor sizes = optional_tensor_argument("rnn", "batch_sizes", batch_sizes);
  const OptionalTensor c = optional_tensor_argument("rnn", "cx", cx);
  const OptionalTensor mask = optional_tensor_argument("rnn", "zoneout_mask", zoneout_mask);
  if (!served(x) || !served(h) || !served(c)) return py::none();
  const std::optional<Tensors> list = tensors_argument("weights", weights);
  if (!list) return py::none();
  std::optional<Tensors> panels, scales;
  if (!norms.is_none() && !(scales = tensors_argument("norms", norms))) return py::none();
  if (!packed.is_none() && !(panels = tensors_argument("packed", packed))) return py::none();
  const std::optional<Mode> name = optional_string_argument("rnn", "mode", mode);
  Outputs y;
  {
    py::gil_scoped_release no_gil;
    y = rnn_op().call(x, sizes, h, c, *list, name.value_or(""), panels ? OptionalTensorList(*panels) : std::nullopt,
                      scales ? OptionalTensorList(*scales) : std::nullopt, mask, zoneout);
  }
  return py::make_tuple(wrap(std::get<0>(std::move(y))), wrap(std::get<1>(std::move(y))),
                        wrap(std::get<2>(std::move(y))));
}

// A step of a cell's module from its own parameters: what Python would do on the long way takes as long as a small
// kernel. hx, cx: both None for zeros. kept: None, or (stamp, {(mode,): packed}, …) of fastnn/nn/_frozen.py. None where anything
// is not plain: then the long way.
py::object rnn_cell(const py::dict& parameters, py::handle input, py::handle hx, py::handle cx, py::handle mode,
                    py::handle kept) {
  if (!THPVariable_Check(input.ptr()) || !plain(input) || !plain(hx) || !plain(cx)) return py::none();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  OptionalTensor h = optional_tensor_argument("rnn", "hx", hx), c = optional_tensor_argument("rnn", "cx", cx);
  if (x.dim() != 2 || (h && h->dim() != 2) || (c && c->dim() != 2) || !served(x) || !served(h) || !served(c))
    return py::none();
  static PyObject* const names[] = {PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
                                    PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
  std::vector<py::handle> given;
  Tensors weights;
  for (PyObject* const name : names) {
    const py::handle w = PyDict_GetItemWithError(parameters.ptr(), name);
    if (!w || (!w.is_none() && !plain(w))) return py::none();
    if (w.is_none()) continue;
    given.push_back(w);
    weights.push_back(tensor_argument("rnn", "weights", w));
    if (!served(weights.back())) return py::none();
  }
  if (weights.size() % 2 != 0 || weights[1].dim() != 2) return py::none();
  const Mode name = *optional_string_argument("rnn", "mode", mode);
  if (!h) {
    if (c) return py::none();
    h = at::zeros({x.size(0), weights[1].size(1)}, x.options());
    if (name == "LSTM") c = h;
  }
  Tensors packed;
  if (!kept.is_none()) {
    if (!fresh(PyTuple_GetItem(kept.ptr(), 0), given)) return py::none();
    const py::handle panels = PyDict_GetItemWithError(PyTuple_GetItem(kept.ptr(), 1), py::make_tuple(mode).ptr());
    if (!panels) return py::none();
    packed.push_back(tensor_argument("rnn", "packed", panels));
  }
  Outputs y;
  {
    py::gil_scoped_release no_gil;
    y = rnn_op().call(x, std::nullopt, *h, c, weights, name, packed.empty() ? std::nullopt : OptionalTensorList(packed),
                      std::nullopt, std::nullopt, 0.0);
  }
  if (!c) return wrap(std::get<0>(std::move(y)));
  return py::make_tuple(wrap(std::get<0>(std::move(y))), wrap(std::get<2>(std::move(y))));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "rnn(Tensor input, Tensor? batch_sizes, Tensor hx, Tensor? cx, Tensor[] weights, str mode, "
      "Tensor[]? packed=None, Tensor[]? norms=None, Tensor? zoneout_mask=None, float zoneout=0.0) -> (Tensor output, "
      "Tensor h_n, Tensor c_n)");
  m.def(
      "rnn_train(Tensor input, Tensor? batch_sizes, Tensor hx, Tensor? cx, Tensor[] weights, str mode, "
      "Tensor[]? norms=None, Tensor? zoneout_mask=None, float zoneout=0.0) -> "
      "(Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)");
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, "
      "Tensor hx, Tensor? cx, Tensor[] weights, Tensor output, Tensor reserve, str mode, "
      "Tensor[]? norms, Tensor? zoneout_mask, float zoneout, bool[4] output_mask) -> "
      "(Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor[] grad_weights, Tensor[] grad_norms)");
  m.def("rnn_pack(Tensor[] weights, str mode) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastnn, Autograd, m) { m.impl("rnn", rnn_autograd); }

void bind_rnn(py::module_& m) {
  m.def("rnn", rnn_entry, py::arg("input"), py::arg("batch_sizes"), py::arg("hx"), py::arg("cx"), py::arg("weights"),
        py::arg("mode"), py::arg("packed") = py::none(), py::arg("norms") = py::none(),
        py::arg("zoneout_mask") = py::none(), py::arg("zoneout") = 0.0);
  m.def("rnn_cell", rnn_cell, py::arg("parameters"), py::arg("input"), py::arg("hx"), py::arg("cx"), py::arg("mode"),
        py::arg("kept"));
  m.def("_rnn_packed_size", [](const std::string& mode, int64_t input_size, int64_t hidden_size, int64_t state_size,
                               bool project, bool is_double) {
    for (const RnnModeRow& row : kRnnModes)
      if (mode == row.name)
        return cpu::rnn_packed_size(
            {is_double ? DType::Float64 : DType::Float32, row.mode, project, input_size, hidden_size, state_size});
    throw py::value_error("fastnn.rnn_pack: mode must be one of RNN_TANH, RNN_RELU, LSTM, GRU; got '" + mode + "'.");
  });
}

}  // namespace fastnn::bindings

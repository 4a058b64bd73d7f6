// fastnn::rnn, one layer over a whole sequence, its backward, and the packing of frozen weights: check, allocate, fill
// the params, call the kernels. Schemas, autograd and Python's way in: rnn_autograd.cpp.
#include "fastnn/rnn.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings/checks.h"

namespace fastnn::bindings {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensorList = std::optional<at::TensorList>;
using Mode = std::string_view;

// Contiguous arguments, kept alive, and the sizes.
struct Problem {
  RnnParams params;
  Tensors held;
  int gates, each;               // `each`: weights of one direction
  bool step, biased, projected;  // step: input is [B, I], one step of a cell
  std::vector<int64_t> output_shape;

  const void* hold(const Tensor& t) {
    held.push_back(t.contiguous());
    return held.back().const_data_ptr();
  }
};

void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& first,
                 const char* first_name = "input") {
  check_same("rnn", name, t, first, first_name);
  TORCH_CHECK(t.sizes() == shape, "fastnn.rnn: ", name, " must be ", shape, "; got ", t.sizes(), ".");
}

void read_mode(Problem& q, Mode mode) {
  const RnnModeRow* row = nullptr;
  for (const RnnModeRow& known : kRnnModes)
    if (mode == known.name) row = &known;
  TORCH_CHECK_VALUE(row, "fastnn.rnn: mode must be one of RNN_TANH, RNN_RELU, LSTM, GRU; got '", std::string(mode),
                    "'.");
  q.params.mode = row->mode, q.gates = row->gates;
}

// The sizes that the weights of all directions give.
void read_sizes(Problem& q, at::TensorList weights, int directions) {
  RnnParams& p = q.params;
  p.directions = directions;
  q.each = static_cast<int>(weights.size()) / directions;
  TORCH_CHECK(weights.size() % directions == 0 && q.each >= 2 && q.each <= 5,
              "fastnn.rnn: weights must be weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] for each of ",
              directions, " directions; got ", weights.size(), " tensors.");
  q.biased = q.each >= 4, q.projected = q.each % 2 == 1;
  TORCH_CHECK(!q.projected || p.mode == RnnMode::Lstm,
              "fastnn.rnn: weights must not hold weight_hr (proj_size) unless mode is LSTM.");
  TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % q.gates == 0, "fastnn.rnn: weight_ih must be [", q.gates,
              " * hidden_size, input_size]; got ", weights[0].sizes(), ".");
  p.input_size = weights[0].size(1), p.hidden_size = weights[0].size(0) / q.gates;
  TORCH_CHECK(!q.projected || weights[q.each - 1].dim() == 2,
              "fastnn.rnn: weight_hr must be [proj_size, hidden_size]; got ", weights[q.each - 1].sizes(), ".");
  p.state_size = q.projected ? weights[q.each - 1].size(0) : p.hidden_size;
}

// The weights of one direction, of the dtype of `first`.
RnnWeights take_weights(Problem& q, at::TensorList w, const Tensor& first, const char* first_name) {
  const int64_t I = q.params.input_size, H = q.params.hidden_size, P = q.params.state_size;
  const auto take = [&](const char* name, const Tensor& t, at::IntArrayRef shape) {
    check_shape(name, t, shape, first, first_name);
    return q.hold(t);
  };
  RnnWeights found;
  found.weight_ih = take("weight_ih", w[0], {q.gates * H, I});
  found.weight_hh = take("weight_hh", w[1], {q.gates * H, P});
  if (q.biased) {
    found.bias_ih = take("bias_ih", w[2], {q.gates * H});
    found.bias_hh = take("bias_hh", w[3], {q.gates * H});
  }
  if (q.projected) found.weight_hr = take("weight_hr", w[q.each - 1], {P, H});
  return found;
}

// Where the gates are normalised: norm_ih, norm_hh[, norm_c_weight, norm_c_bias] of each direction.
void take_norms(Problem& q, const OptionalTensorList& norms, const Tensor& input) {
  if (!norms || norms->empty()) return;
  RnnParams& p = q.params;
  const bool lstm = p.mode == RnnMode::Lstm;
  const size_t each = lstm ? 4 : 2;
  TORCH_CHECK(!q.step && norms->size() == each * p.directions, "fastnn.rnn: norms must be norm_ih, norm_hh",
              lstm ? ", norm_c_weight, norm_c_bias" : "", " for each direction of a sequence; got ", norms->size(),
              " tensors.");
  for (int d = 0; d < p.directions; ++d) {
    const auto take = [&](const char* name, int i, int64_t size) {
      const Tensor& t = (*norms)[d * each + i];
      check_shape(name, t, {size}, input);
      return q.hold(t);
    };
    RnnWeights& w = p.weights[d];
    w.norm_ih = take("norm_ih", 0, q.gates * p.hidden_size), w.norm_hh = take("norm_hh", 1, q.gates * p.hidden_size);
    if (lstm)
      w.norm_c_weight = take("norm_c_weight", 2, p.hidden_size), w.norm_c_bias = take("norm_c_bias", 3, p.hidden_size);
  }
}

void take_zoneout(Problem& q, const OptionalTensor& mask, double zoneout) {
  RnnParams& p = q.params;
  TORCH_CHECK_VALUE(zoneout >= 0 && zoneout < 1, "fastnn.rnn: zoneout must be a number in [0, 1); got ", zoneout, ".");
  const bool masked = mask && mask->defined();
  TORCH_CHECK(!q.step || (!masked && zoneout == 0), "fastnn.rnn: zoneout must be 0 for one step of a cell.");
  p.zoneout = masked ? 0 : zoneout;
  if (!masked) return;
  TORCH_CHECK(mask->scalar_type() == at::kBool && mask->is_cpu() &&
                  mask->sizes() == at::IntArrayRef({p.directions, p.rows, p.state_size}),
              "fastnn.rnn: zoneout_mask must be a bool tensor [directions, rows, state_size] = [", p.directions, ", ",
              p.rows, ", ", p.state_size, "] on the CPU; got ", mask->scalar_type(), " ", mask->sizes(), " on ",
              mask->device(), ".");
  p.zoneout_mask = static_cast<const uint8_t*>(q.hold(*mask));
}

RnnPack pack_params(const Problem& q) {
  const RnnParams& p = q.params;
  return {p.dtype, p.mode, q.projected, p.input_size, p.hidden_size, p.state_size};
}

at::ScalarType compute_type(DType dtype) { return dtype == DType::Float64 ? at::kDouble : at::kFloat; }

void take_packed(Problem& q, const OptionalTensorList& packed) {
  if (!packed || packed->empty()) return;
  RnnParams& p = q.params;
  TORCH_CHECK(packed->size() == static_cast<size_t>(p.directions),
              "fastnn.rnn: packed must hold one tensor for each of ", p.directions, " directions; got ", packed->size(),
              ".");
  const int64_t size = cpu::rnn_packed_size(pack_params(q));
  for (int d = 0; d < p.directions; ++d) {
    const Tensor& t = (*packed)[d];
    TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == size && t.scalar_type() == compute_type(p.dtype),
                "fastnn.rnn: packed must be what rnn_pack made of these weights under this ISA (", size,
                " elements of ", compute_type(p.dtype), "); got ", t.numel(), " of ", t.scalar_type(), ".");
    p.weights[d].packed = t.const_data_ptr();
  }
}

// Not p.cx, which is null for an empty batch, too.
bool given(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

Problem check(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx, const OptionalTensor& cx,
              at::TensorList weights, Mode mode, const OptionalTensorList& norms, const OptionalTensor& zoneout_mask,
              double zoneout) {
  Problem q;
  RnnParams& p = q.params;
  read_mode(q, mode);
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
  const int64_t directions = q.step ? 1 : hx.size(0);
  TORCH_CHECK(directions == 1 || directions == 2, "fastnn.rnn: hx must have 1 or 2 directions; got ", hx.sizes(), ".");
  read_sizes(q, weights, static_cast<int>(directions));
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
  const int64_t I = p.input_size, B = p.batch, D = p.directions;

  const auto shape = [&](int64_t size) {
    return q.step ? std::vector<int64_t>{B, size} : std::vector<int64_t>{D, B, size};
  };
  check_shape("hx", hx, shape(p.state_size), input);
  p.hx = q.hold(hx);
  TORCH_CHECK(lstm == given(cx), "fastnn.rnn: cx must be given for LSTM and for no other mode.");
  if (lstm) {
    check_shape("cx", *cx, shape(p.hidden_size), input);
    p.cx = q.hold(*cx);
  }
  for (int64_t d = 0; d < D; ++d) p.weights[d] = take_weights(q, weights.slice(d * q.each, q.each), input, "input");
  take_norms(q, norms, input);
  take_zoneout(q, zoneout_mask, zoneout);
  q.held.push_back(input.stride(-1) == 1 || I == 1 ? input : input.contiguous());
  const Tensor& x = q.held.back();
  p.input = x.const_data_ptr();
  p.stride_step = input.dim() == 3 ? x.stride(0) : 0, p.stride_batch = x.stride(-2);
  q.output_shape = input.sizes().vec();
  q.output_shape.back() = D * p.state_size;
  return q;
}

Tensor compute_empty(at::IntArrayRef shape, DType dtype, const Tensor& like) {
  return at::empty(shape, like.options().dtype(compute_type(dtype)));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx,
                                           const OptionalTensor& cx, at::TensorList weights, Mode mode,
                                           const OptionalTensorList& packed, const OptionalTensorList& norms,
                                           const OptionalTensor& zoneout_mask, double zoneout, Tensor* reserve) {
  Problem q = check(input, batch_sizes, hx, cx, weights, mode, norms, zoneout_mask, zoneout);
  take_packed(q, packed);
  RnnParams& p = q.params;
  Tensor output = at::empty(q.output_shape, input.options());
  Tensor h_n = q.step ? at::empty({0}, input.options()) : at::empty(hx.sizes(), input.options());
  Tensor c_n = given(cx) ? at::empty(cx->sizes(), input.options()) : at::empty({0}, input.options());
  p.output = output.mutable_data_ptr();
  p.h_n = q.step ? nullptr : h_n.mutable_data_ptr();
  p.c_n = given(cx) ? c_n.mutable_data_ptr() : nullptr;
  if (reserve) {
    *reserve = compute_empty({p.directions, p.rows, rnn_reserved(p)}, p.dtype, input);
    p.reserve = reserve->mutable_data_ptr();
  }
  if (p.batch > 0) cpu::rnn_forward(p);
  return {std::move(output), std::move(h_n), std::move(c_n)};
}

std::tuple<Tensor, Tensor, Tensor> rnn_cpu(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx,
                                           const OptionalTensor& cx, at::TensorList weights, Mode mode,
                                           OptionalTensorList packed, OptionalTensorList norms,
                                           const OptionalTensor& zoneout_mask, double zoneout) {
  return forward(input, batch_sizes, hx, cx, weights, mode, packed, norms, zoneout_mask, zoneout, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_train_cpu(const Tensor& input, const OptionalTensor& batch_sizes,
                                                         const Tensor& hx, const OptionalTensor& cx,
                                                         at::TensorList weights, Mode mode, OptionalTensorList norms,
                                                         const OptionalTensor& zoneout_mask, double zoneout) {
  Tensor reserve;
  auto [output, h_n, c_n] =
      forward(input, batch_sizes, hx, cx, weights, mode, std::nullopt, norms, zoneout_mask, zoneout, &reserve);
  return {std::move(output), std::move(h_n), std::move(c_n), std::move(reserve)};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors> rnn_backward_cpu(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx, const OptionalTensor& cx,
    at::TensorList weights, const Tensor& output, const Tensor& reserve, Mode mode, OptionalTensorList norms,
    const OptionalTensor& zoneout_mask, double zoneout, std::array<bool, 4> output_mask) {
  Problem q = check(input, batch_sizes, hx, cx, weights, mode, norms, zoneout_mask, zoneout);
  RnnBackwardParams b{q.params};
  const RnnParams& p = b.forward;
  const auto gradient = [&](const char* name, const OptionalTensor& t, at::IntArrayRef shape) -> const void* {
    if (!t || !t->defined()) return nullptr;
    check_shape(name, *t, shape, input);
    return q.hold(*t);
  };
  b.grad_output = gradient("grad_output", grad_output, q.output_shape);
  if (!q.step) b.grad_h_n = gradient("grad_h_n", grad_h_n, hx.sizes());
  if (given(cx)) b.grad_c_n = gradient("grad_c_n", grad_c_n, cx->sizes());
  check_shape("output", output, q.output_shape, input);
  TORCH_CHECK(reserve.numel() == p.directions * p.rows * rnn_reserved(p),
              "fastnn.rnn: reserve must be what rnn_train returned; got ", reserve.sizes(), ".");
  b.forward.output = const_cast<void*>(q.hold(output));
  b.forward.reserve = const_cast<void*>(q.hold(reserve));
  Tensor grad_input, grad_hx, grad_cx;
  Tensors grad_weights, grad_norms;
  if (output_mask[0]) grad_input = at::empty(input.sizes(), input.options());
  if (output_mask[1]) grad_hx = at::empty(hx.sizes(), hx.options());
  if (output_mask[2] && given(cx)) grad_cx = at::empty(cx->sizes(), cx->options());
  if (output_mask[3])
    for (const Tensor& w : weights) grad_weights.push_back(at::empty(w.sizes(), w.options()));
  if (output_mask[3] && norms)
    for (const Tensor& w : *norms) grad_norms.push_back(at::empty(w.sizes(), w.options()));
  b.grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr;
  b.grad_hx = output_mask[1] ? grad_hx.mutable_data_ptr() : nullptr;
  b.grad_cx = grad_cx.defined() ? grad_cx.mutable_data_ptr() : nullptr;
  for (int d = 0; d < p.directions && output_mask[3]; ++d) {
    auto& g = b.grad_weights[d];
    const auto at = [&](int i) { return grad_weights[d * q.each + i].mutable_data_ptr(); };
    g.weight_ih = at(0), g.weight_hh = at(1);
    if (q.biased) g.bias_ih = at(2), g.bias_hh = at(3);
    if (q.projected) g.weight_hr = at(q.each - 1);
    if (!p.normed()) continue;
    const size_t each = grad_norms.size() / p.directions;
    const auto norm = [&](size_t i) { return i < each ? grad_norms[d * each + i].mutable_data_ptr() : nullptr; };
    g.norm_ih = norm(0), g.norm_hh = norm(1), g.norm_c_weight = norm(2), g.norm_c_bias = norm(3);
  }
  if (p.batch > 0) {
    cpu::rnn_backward(b);
  } else {  // sums over nothing
    for (Tensors* grads : {&grad_weights, &grad_norms})
      for (Tensor& grad : *grads) grad.zero_();
  }
  return {std::move(grad_input), std::move(grad_hx), std::move(grad_cx), std::move(grad_weights),
          std::move(grad_norms)};
}

Tensor rnn_pack_cpu(at::TensorList weights, Mode mode) {
  Problem q;
  read_mode(q, mode);
  read_sizes(q, weights, 1);
  const std::optional<DType> dtype = dtype_of(weights[0]);
  TORCH_CHECK(dtype, "fastnn.rnn_pack: weights must be float32, float64, bfloat16 or float16; got ",
              weights[0].scalar_type(), ".");
  q.params.dtype = *dtype;
  RnnPack p = pack_params(q);
  p.weights = take_weights(q, weights, weights[0], "weight_ih");
  Tensor packed = compute_empty({cpu::rnn_packed_size(p)}, *dtype, weights[0]);
  p.packed = packed.mutable_data_ptr();
  cpu::rnn_pack(p);
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("rnn", rnn_cpu);
  m.impl("rnn_train", rnn_train_cpu);
  m.impl("rnn_backward", rnn_backward_cpu);
  m.impl("rnn_pack", rnn_pack_cpu);
}

}  // namespace fastnn::bindings

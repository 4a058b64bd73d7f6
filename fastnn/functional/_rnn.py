"""Fakes and second derivatives of fastnn::rnn and its sisters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastnn import _fallback, reference
from fastnn._library import _C
from fastnn.functional import _batching, _transforms
from fastnn.functional._transforms import below_autograd

_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}
_RESERVED = {"RNN_TANH": 0, "RNN_RELU": 0, "LSTM": 5, "GRU": 4}


def _check(input, batch_sizes, hx, cx, weights, norms):
    """Whether it is one step, and the directions; the rules are those of ``check`` in csrc/bindings/rnn.cpp."""
    step = input.dim() == 2 and batch_sizes is None
    size = weights[0].shape[1]
    torch._check(
        input.shape[-1] == size,
        lambda: (
            f"fastnn.rnn: input must have input_size = {size} (weight_ih is {list(weights[0].shape)}) as its last "
            f"dimension; got {list(input.shape)}."
        ),
    )
    for name, tensor in (("hx", hx), ("cx", cx), *(("weights", w) for w in (*weights, *(norms or ())))):
        torch._check(
            tensor is None or tensor.dtype == input.dtype,
            lambda: f"fastnn.rnn: {name} must have the dtype of input ({input.dtype}); got {tensor.dtype}.",
        )
    return step, 1 if step else hx.shape[0]


@torch.library.register_fake("fastnn::rnn")
def _rnn_fake(input, batch_sizes, hx, cx, weights, mode, packed=None, norms=None, zoneout_mask=None, zoneout=0.0):
    step, directions = _check(input, batch_sizes, hx, cx, weights, norms)
    output = input.new_empty([*input.shape[:-1], directions * hx.shape[-1]])
    h_n = input.new_empty(0) if step else input.new_empty(hx.shape)
    return output, h_n, input.new_empty(0 if cx is None else cx.shape)


@torch.library.register_fake("fastnn::rnn_train")
def _(input, batch_sizes, hx, cx, weights, mode, norms=None, zoneout_mask=None, zoneout=0.0):
    directions = _check(input, batch_sizes, hx, cx, weights, norms)[1]
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    width = _RESERVED[mode] * (weights[0].shape[0] // _GATES[mode])  # rnn_reserved of csrc/include/fastnn/rnn.h
    if _GATES[mode] == 1 and (zoneout_mask is not None or zoneout > 0):
        width += weights[0].shape[0]
    if norms:
        width += 2 * weights[0].shape[0] + (4 if mode == "LSTM" else 2)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return *_rnn_fake(input, batch_sizes, hx, cx, weights, mode), input.new_empty(
        [directions, rows, width], dtype=dtype
    )


@torch.library.register_fake("fastnn::rnn_backward")
def _(
    grad_output,
    grad_h_n,
    grad_c_n,
    input,
    batch_sizes,
    hx,
    cx,
    weights,
    output,
    reserve,
    mode,
    norms,
    zoneout_mask,
    zoneout,
    output_mask,
):
    return (
        input.new_empty(input.shape) if output_mask[0] else None,
        hx.new_empty(hx.shape) if output_mask[1] else None,
        cx.new_empty(cx.shape) if output_mask[2] and cx is not None else None,
        [w.new_empty(w.shape) for w in weights] if output_mask[3] else [],
        [w.new_empty(w.shape) for w in norms or ()] if output_mask[3] else [],
    )


@torch.library.register_fake("fastnn::rnn_pack")
def _(weights, mode):
    projected, double = len(weights) % 2 == 1, weights[0].dtype == torch.float64
    hidden_size = weights[0].shape[0] // _GATES[mode]
    state_size = weights[-1].shape[0] if projected else hidden_size
    size = _C._rnn_packed_size(mode, weights[0].shape[1], hidden_size, state_size, projected, double)
    return weights[0].new_empty([size], dtype=torch.float64 if double else torch.float32)


def _setup_context(ctx, inputs, output):
    grads, (x, batch_sizes, hx, cx, weights) = inputs[:3], inputs[3:8]
    ctx.mode, norms, zoneout_mask, ctx.zoneout, ctx.mask = inputs[10:]
    ctx.norms = None if norms is None else len(norms)
    ctx.save_for_backward(*grads, x, batch_sizes, hx, cx, zoneout_mask, *weights, *(norms or ()))


def _backward(ctx, grad_grad_input, grad_grad_hx, grad_grad_cx, grad_grad_weights, grad_grad_norms):
    *grads, input, batch_sizes, hx, cx, zoneout_mask = ctx.saved_tensors[:8]
    flat = ctx.saved_tensors[8:]  # weights, then norms
    count = len(flat) - (ctx.norms or 0)
    zoneout = ctx.zoneout or None if zoneout_mask is None else zoneout_mask.to(input.dtype)

    def formula(input, hx, cx, *flat):
        return reference.rnn(input, batch_sizes, hx, cx, flat[:count], ctx.mode, zoneout, flat[count:] or None)

    arrived = [*grad_grad_weights, *grad_grad_norms] if ctx.mask[3] else [None] * len(flat)
    grad_grads, (g_input, g_hx, g_cx, *g_flat) = reference.vjp_of_vjp(
        formula,
        (input, hx, cx, *flat),
        grads,
        (*ctx.mask[:3], *[ctx.mask[3]] * len(flat)),
        (grad_grad_input, grad_grad_hx, grad_grad_cx, *arrived),
    )
    g_weights, g_norms = g_flat[:count], g_flat[count:] if ctx.norms is not None else None
    return *grad_grads, g_input, None, g_hx, g_cx, g_weights, None, None, None, g_norms, None, None, None


torch.library.register_autograd("fastnn::rnn_backward", _backward, setup_context=_setup_context)


@dataclass(frozen=True)
class Rnn(_transforms.Op):
    """The op for torch.func's transforms; its tensors are input, batch_sizes, hx, cx, zoneout_mask, weights, norms."""

    mode: str
    zoneout: float
    norms: int  # how many, of each layer

    results = 3

    def _split(self, tensors):
        """The arguments of the ops in their order: what comes before the mode, and after it."""
        input, batch_sizes, hx, cx, zoneout_mask, *flat = tensors
        weights, norms = flat[: len(flat) - self.norms], flat[len(flat) - self.norms :] or None
        return (input, batch_sizes, hx, cx, weights), (norms, zoneout_mask, self.zoneout)

    def forward(self, *tensors):
        first, last = self._split(tensors)
        return torch.ops.fastnn.rnn_train(*first, self.mode, *last)

    def backward(self, wanted, grads, tensors, outputs):
        first, last = self._split(tensors)
        mask = [wanted[0], wanted[2], wanted[3], any(wanted[5:])]
        with below_autograd():
            grad_input, grad_hx, grad_cx, grad_weights, grad_norms = torch.ops.fastnn.rnn_backward(
                *grads, *first, outputs[0], outputs[-1], self.mode, *last, mask
            )
        of_flat = (*grad_weights, *grad_norms) if mask[3] else (None,) * (len(tensors) - 5)
        return grad_input, None, grad_hx, grad_cx, None, *of_flat

    def formula(self, *tensors):
        (*first, weights), (norms, zoneout_mask, zoneout) = self._split(tensors)
        kept = zoneout or None if zoneout_mask is None else zoneout_mask.to(tensors[0].dtype)
        return reference.rnn(*first, weights, self.mode, kept, norms)

    def constant(self, outputs):
        return tuple(y for i, y in enumerate(outputs) if i == 3 or y.dim() < 2)

    batch = staticmethod(_batching.rnn)
    batch_backward = staticmethod(_batching.rnn_backward)


def transformed(input, batch_sizes, hx, cx, weights, mode, norms, zoneout_mask, zoneout):
    """The op on one layer under a transform or with a tangent; None elsewhere, and where no kernel takes the tensors."""
    if not _transforms.active() or _fallback.why_not(input, hx, cx, *weights, *(norms or ())) is not None:
        return None
    op = Rnn(mode, zoneout, len(norms or ()))
    outputs = _transforms.call(op, input, batch_sizes, hx, cx, zoneout_mask, *weights, *(norms or ()))
    return None if outputs is None else outputs[:3]


@torch.library.register_vmap("fastnn::rnn")
def _(
    info, in_dims, input, batch_sizes, hx, cx, weights, mode, packed=None, norms=None, zoneout_mask=None, zoneout=0.0
):
    in_dims = (*in_dims, *(None,) * 4)  # arguments at the end may have been left out
    dims = (*in_dims[:4], in_dims[8], *in_dims[4], *(in_dims[7] or ()))
    tensors = (input, batch_sizes, hx, cx, zoneout_mask, *weights, *(norms or ()))
    op = Rnn(mode, zoneout, len(norms or ()))
    outputs, where = _batching.rnn(_transforms.run_forward, info.batch_size, dims, op, *tensors)
    return outputs[:3], where[:3] if isinstance(where, tuple) else where


@torch.library.register_vmap("fastnn::rnn_backward")
def _(info, in_dims, *args):
    order = (0, 1, 2, 3, 4, 5, 6, 12)  # grads, input, batch_sizes, hx, cx, zoneout_mask
    weights, output, reserve, mode, norms, _, zoneout, mask = args[7:]
    flat, of_flat = (*weights, *(norms or ())), (*in_dims[7], *(in_dims[11] or ()))
    wanted = (mask[0], False, mask[1], mask[2] and args[6] is not None, False, *(mask[3],) * len(flat))
    pull = _transforms.Pull(Rnn(mode, zoneout, len(norms or ())), wanted, 3)
    dims = (*(in_dims[i] for i in order), *of_flat, *in_dims[8:10])
    tensors = (*(args[i] for i in order), *flat, output, reserve)
    found, where = _transforms.batched_backward(info, dims, pull, *tensors)
    ends = 5 + len(weights)

    def in_order(values):
        return values[0], values[2], values[3], list(values[5:ends]) * mask[3], list(values[ends:]) * mask[3]

    return in_order(found), in_order(where)


_transforms.register_old_vmap("rnn_backward")

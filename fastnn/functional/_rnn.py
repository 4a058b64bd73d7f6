"""Fakes and second derivatives of fastnn::rnn and its sisters."""

from __future__ import annotations

import torch

from fastnn import reference
from fastnn._library import _C

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

"""rnn: recurrent layers over whole sequences, and their cells, in one kernel call for a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from fastnn import _fallback, reference
from fastnn._library import _C

_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}
_RESERVED = {"RNN_TANH": 0, "RNN_RELU": 0, "LSTM": 5, "GRU": 4}
_STACKS = {"RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu, "LSTM": _VF.lstm, "GRU": _VF.gru}


def _layer(input, batch_sizes, hx, cx, weights, mode, packed, norms=None, zoneout_mask=None, zoneout=0.0):
    """The op on one layer, or None where no kernel takes these tensors."""
    options = (packed, norms, zoneout_mask, zoneout)
    if torch.compiler.is_compiling():
        if _fallback.why_not(input, hx, cx, *weights, *(norms or ())) is not None:
            return None
        return torch.ops.fastnn.rnn(input, batch_sizes, hx, cx, weights, mode, *options)
    return _C.rnn(input, batch_sizes, hx, cx, weights, mode, *options)


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    packed: Sequence[Tensor] | None = None,
    norms: Sequence[Tensor] | None = None,
    zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Run a stack of recurrent layers over a sequence; each layer is one kernel call.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad f = \tanh, \mathrm{relu}; \text{ LSTM and GRU as in torch}

    With layer norm

    .. math:: \gamma_{ih} \odot \mathrm{LN}(W_{ih} x_t) + b_{ih}, \quad \gamma_{hh} \odot \mathrm{LN}(W_{hh} h_{t-1}) + b_{hh}

    stand for :math:`W_{ih} x_t + b_{ih}` and :math:`W_{hh} h_{t-1} + b_{hh}`, LN over all gates together with eps 1e-5;
    LSTM's output is :math:`\sigma(o) \odot \tanh(\gamma_c \odot \mathrm{LN}(c_t) + \beta_c)`. With zoneout

    .. math::
        h_t = m_t \odot h_{t-1} + (1 - m_t) \odot \tilde h_t, \quad m_t \sim \mathrm{Bernoulli}(p) \text{ in training, }
        m_t = p \text{ else}

    with :math:`\tilde h_t` what the layer makes of :math:`x_t` and :math:`h_{t-1}`. The cell of LSTM has no zoneout.

    Args:
        input: ``[steps, batch, input_size]``, ``[batch, steps, input_size]`` with ``batch_first``, or with
            ``batch_sizes`` the data of a PackedSequence; float32, float64, bfloat16 or float16.
        batch_sizes: int64 ``[steps]`` of a PackedSequence, or None.
        hx: initial states ``[num_layers * directions, batch, state_size]``, state_size being proj_size or hidden_size.
        cx: initial cells ``[num_layers * directions, batch, hidden_size]`` for LSTM, else None.
        weights: flat, for each layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``.
        mode: ``RNN_TANH``, ``RNN_RELU``, ``LSTM`` or ``GRU``.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: as in ``torch.lstm``.
        packed: for inference with frozen weights, what ``torch.ops.fastnn.rnn_pack(weights, mode)`` made of the weights
            of each layer and direction.
        norms: flat, for each layer and direction ``norm_ih, norm_hh``, both ``[gates * hidden_size]``, and for LSTM
            ``norm_c_weight, norm_c_bias``, ``[hidden_size]``; None or empty: no layer norm.
        zoneout: p. Masks are drawn from torch's default generator.

    Returns:
        output, h_n, and c_n for LSTM (else None), shaped as torch's. States are kept in float32 between steps
        (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, or an empty sequence.
        ValueError: an unknown mode, or zoneout outside [0, 1).

    Source: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh``; Ba, Kiros and Hinton, arXiv 1607.06450; Krueger et al., arXiv
    1606.01305; GRU and LSTM with both as in lmnt-com/haste. Kernels in ``csrc/cpu/rnn.inl``.
    """
    directions = 2 if bidirectional else 1
    each, norms_each = (len(part) // num_layers for part in (weights, norms or ()))
    x = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    h_n, c_n = [], []
    for layer in range(num_layers):
        span = slice(layer * directions, (layer + 1) * directions)
        h, c = (hx, cx) if num_layers == 1 else (hx[span], None if cx is None else cx[span])
        own = list(weights[layer * each : (layer + 1) * each])
        scales = list(norms[layer * norms_each : (layer + 1) * norms_each]) if norms else None
        mask = None
        if zoneout > 0 and train:
            rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
            mask = torch.rand(directions, rows, h.shape[-1], device=x.device) < zoneout
        y = _layer(x, batch_sizes, h, c, own, mode, None if packed is None else packed[span], scales, mask, zoneout)
        if y is None and (norms or zoneout > 0):
            y = _regularized(x, batch_sizes, h, c, own, mode, scales, zoneout if mask is None else mask)
        elif y is None:
            rest = (has_biases, num_layers, dropout, train, bidirectional)
            return _stack(input, batch_sizes, hx, cx, weights, mode, rest, batch_first)
        x = y[0]
        h_n.append(y[1])
        c_n.append(y[2])
        if dropout > 0 and train and layer + 1 < num_layers:
            x = F.dropout(x, dropout, True)
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    join = torch.cat if num_layers > 1 else lambda states: states[0]
    return x, join(h_n), None if cx is None else join(c_n)


def _stack(input, batch_sizes, hx, cx, weights, mode, rest, batch_first):
    """torch's own operator for the whole stack."""
    states = hx if cx is None else (hx, cx)

    def call():
        if batch_sizes is None:
            return _STACKS[mode](input, states, list(weights), *rest, batch_first)
        return _STACKS[mode](input, batch_sizes, states, list(weights), *rest)

    y = _fallback.fallback("rnn", (input, hx, cx, *weights), call)
    return (*y, None) if cx is None else y


def _regularized(input, batch_sizes, hx, cx, weights, mode, norms, zoneout):
    """The formula in torch's operators for a layer with layer norm or zoneout: torch has no operator for the whole of it."""
    tensors = (input, hx, cx, *weights, *(norms or ()))
    wide = torch.promote_types(input.dtype, torch.float32)  # states are not rounded between steps

    def call():
        x, h, c, *flat = (None if t is None else t.to(wide) for t in tensors)
        m = zoneout.to(wide) if isinstance(zoneout, Tensor) else zoneout
        y = reference.rnn(x, batch_sizes, h, c, flat[: len(weights)], mode, m, flat[len(weights) :] or None)
        return tuple(t.to(input.dtype) for t in y)

    return _fallback.fallback("rnn", tensors, call)


def _cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode, stock, packed):
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        weights += [b if b is not None else w_ih.new_zeros(w_ih.shape[0]) for b in (b_ih, b_hh)]
    if input.dim() != 2:
        torch._check(False, lambda: f"fastnn.rnn: input must be [batch, input_size]; got {list(input.shape)}.")
    y = _layer(input, None, hx, cx, weights, mode, None if packed is None else [packed])
    if y is None:
        states = hx if cx is None else (hx, cx)
        return _fallback.fallback(
            "rnn", (input, hx, cx, *weights), lambda: stock(input, states, w_ih, w_hh, b_ih, b_hh)
        )
    return y[0] if cx is None else (y[0], y[2])


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    r"""One step of an Elman network.

    .. math:: h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input: ``[batch, input_size]``; float32, float64, bfloat16 or float16.
        hx: ``[batch, hidden_size]``.
        w_ih, w_hh: ``[hidden_size, input_size]`` and ``[hidden_size, hidden_size]``.
        b_ih, b_hh: ``[hidden_size]`` or None.
        packed: for inference with frozen weights, what ``torch.ops.fastnn.rnn_pack([w_ih, w_hh, b_ih, b_hh], mode)``
            made of these.

    Returns:
        h', ``[batch, hidden_size]``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.

    Source: ``torch.rnn_tanh_cell``.
    """
    return _cell(input, hx, None, w_ih, w_hh, b_ih, b_hh, "RNN_TANH", _VF.rnn_tanh_cell, packed)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    r"""One step of an Elman network with relu, arguments as :func:`rnn_tanh_cell`.

    .. math:: h' = \max(0, W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Returns:
        h', ``[batch, hidden_size]``.

    Source: ``torch.rnn_relu_cell``.
    """
    return _cell(input, hx, None, w_ih, w_hh, b_ih, b_hh, "RNN_RELU", _VF.rnn_relu_cell, packed)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    r"""One step of a GRU, arguments as :func:`rnn_tanh_cell` with three gates (r, z, n) stacked in weights and biases.

    .. math:: h' = (1 - z) \odot n + z \odot h, \quad n = \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn}))

    Returns:
        h', ``[batch, hidden_size]``.

    Source: ``torch.gru_cell``.
    """
    return _cell(input, hx, None, w_ih, w_hh, b_ih, b_hh, "GRU", _VF.gru_cell, packed)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of an LSTM, arguments as :func:`rnn_tanh_cell` with four gates (i, f, g, o) stacked and ``hx = (h, c)``.

    .. math:: c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \quad h' = \sigma(o) \odot \tanh(c')

    Returns:
        (h', c'), each ``[batch, hidden_size]``.

    Source: ``torch.lstm_cell``.
    """
    return _cell(input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh, "LSTM", _VF.lstm_cell, packed)


# ---- fakes and second derivatives ------------------------------------------------------------------------------------


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

"""rnn: recurrent layers over whole sequences, and their cells, in one kernel call for a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from fastnn import _export, _fallback, reference
from fastnn._library import _C
from fastnn.functional import _rnn

_STACKS = {"RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu, "LSTM": _VF.lstm, "GRU": _VF.gru}


def _layer(input, batch_sizes, hx, cx, weights, mode, packed, norms=None, zoneout_mask=None, zoneout=0.0):
    """The op on one layer, or None where no kernel takes these tensors."""
    options = (packed, norms, zoneout_mask, zoneout)
    if _export.tracing():
        if _fallback.why_not(input, hx, cx, *weights, *(norms or ())) is not None:
            return None
        return _export.ops().rnn(input, batch_sizes, hx, cx, weights, mode, *options)
    y = _C.rnn(input, batch_sizes, hx, cx, weights, mode, *options)
    if y is None:
        y = _rnn.transformed(input, batch_sizes, hx, cx, weights, mode, norms, zoneout_mask, zoneout)
    return y


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

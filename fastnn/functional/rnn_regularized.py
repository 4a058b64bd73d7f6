"""rnn_regularized: recurrent layers with layer norm and zoneout, step by step until there is a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.functional.linear import linear


def rnn_regularized(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    *,
    norms: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Run a stack of recurrent layers with layer norm, zoneout or both over a sequence.

    .. math::
        z_t = \gamma_{ih} \odot \mathrm{LN}(W_{ih} x_t) + b_{ih}, \quad
        z'_t = \gamma_{hh} \odot \mathrm{LN}(W_{hh} h_{t-1}) + b_{hh}

    stand for :math:`W_{ih} x_t + b_{ih}` and :math:`W_{hh} h_{t-1} + b_{hh}`, LN over all gates together with eps 1e-5;
    LSTM's output is :math:`\sigma(o) \odot \tanh(\gamma_c \odot \mathrm{LN}(c_t) + \beta_c)`. Then

    .. math::
        h_t = m_t \odot h_{t-1} + (1 - m_t) \odot \tilde h_t, \quad m_t \sim \mathrm{Bernoulli}(p) \text{ in training, }
        m_t = p \text{ else}

    with :math:`\tilde h_t` what the layer makes of :math:`x_t` and :math:`h_{t-1}`. The cell of LSTM has no zoneout.

    A layer's product with the input is one call of ``linear`` for all steps. The rest has no kernel yet: it runs step by
    step in Python, each step one ``linear`` and some norms and pointwise operators of torch, which autograd derives.

    Args:
        input, batch_sizes, hx, cx, weights, mode: as :func:`fastnn.functional.rnn.rnn` takes them.
        norms: flat, for each layer and direction ``norm_ih, norm_hh``, both ``[gates * hidden_size]``, and for LSTM
            ``norm_c_weight, norm_c_bias``, ``[hidden_size]``; empty for layers without layer norm.
        zoneout: p. Masks are drawn from torch's default generator.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: as in ``torch.lstm``.

    Returns:
        output, h_n, and c_n for LSTM (else None), shaped as torch's. States are kept in float32 between steps
        (float64 for float64).

    Raises:
        RuntimeError: shapes or dtypes that do not fit together, or an empty sequence.

    Source: Ba, Kiros and Hinton, arXiv 1607.06450; Krueger et al., arXiv 1606.01305; GRU and LSTM as in lmnt-com/haste.
    """
    for name, tensor in (("hx", hx), ("cx", cx), *(("weights", w) for w in (*weights, *norms))):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(f"fastnn.rnn: {name} must have the dtype of input ({input.dtype}); got {tensor.dtype}.")
    x = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    if not sizes:
        raise RuntimeError(f"fastnn.rnn: input must have a sequence length larger than 0; got {list(input.shape)}.")
    # Half precision is computed in float32, so that states are not rounded between steps.
    dtype = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    x, weights, norms = x.to(dtype), [w.to(dtype) for w in weights], [w.to(dtype) for w in norms]
    states = [s.to(dtype) for s in (hx, cx) if s is not None]
    directions = 2 if bidirectional else 1
    each, norms_each = (len(part) // (num_layers * directions) for part in (weights, norms))
    ends = []
    for layer in range(num_layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            w_ih, w_hh, *rest = weights[k * each : (k + 1) * each]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            norm_ih, *own_norms = norms[k * norms_each : (k + 1) * norms_each] or (None, None)
            recurrent = w_hh, b_hh, rest[-1] if each % 2 else None, *own_norms
            zx, reverse = _gates(x, w_ih, b_ih, norm_ih).flatten(0, -2), k % directions == 1
            y, end = _direction(zx, sizes, [s[k] for s in states], recurrent, mode, zoneout, train, reverse)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
            ends.append(end)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout > 0 and train and layer + 1 < num_layers:
            x = F.dropout(x, dropout, True)
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    h_n, *c_n = (torch.stack(part).to(input.dtype) for part in zip(*ends, strict=True))
    return x.to(input.dtype), h_n, c_n[0] if c_n else None


def _gates(x, weight, bias, norm):
    """A product, normalised where there is a norm."""
    return linear(x, weight, bias) if norm is None else F.layer_norm(linear(x, weight), norm.shape, norm, bias)


def _direction(zx, sizes, first, weights, mode, zoneout, train, reverse):
    """One layer and direction: h of every step, and the state of each sequence at its end.

    Args:
        zx: the input's part of the gates, ``[rows, gates * H]``, rows step after step.
        sizes: how many sequences run at each step: the first of the batch, which is sorted by length.
        first: the initial state, h and for LSTM c; the states here are lists of these.
        weights: w_hh, b_hh and w_hr, the last two or None; norm_hh, and for LSTM norm_c_weight and norm_c_bias, or None.
    """
    zs = zx.split(sizes)
    if zoneout > 0 and train:
        kept = (torch.rand(zx.shape[0], first[0].shape[1], device=zx.device) < zoneout).split(sizes)
    n = sizes[-1 if reverse else 0]
    state, ended, ys = [s[:n] for s in first], [], list(zs)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        before, n = n, sizes[t]
        if n < before:
            ended.append([s[n:] for s in state])
            state = [s[:n] for s in state]
        elif n > before:
            state = [torch.cat((s, s_0[before:n])) for s, s_0 in zip(state, first, strict=True)]
        y, *c = _step(zs[t], state, weights, mode)
        if zoneout > 0:
            y = torch.where(kept[t], state[0], y) if train else torch.lerp(y, state[0], zoneout)
        ys[t], state = y, [y, *c]
    if ended:
        state = [torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)]
    return torch.cat(ys), state


def _step(zx, state, weights, mode):
    """The next state of one step, the product with the input done; the formula is that of ``reference.rnn_step``."""
    h, (w_hh, b_hh, w_hr, norm_hh, *norm_c) = state[0], weights
    zh = _gates(h, w_hh, b_hh, norm_hh)
    if mode == "RNN_TANH":
        return (torch.tanh(zx + zh),)
    if mode == "RNN_RELU":
        return (torch.relu(zx + zh),)
    size = zx.shape[1] // (3 if mode == "GRU" else 4)
    if mode == "GRU":
        (x_rz, x_n), (h_rz, h_n) = (z.split((2 * size, size), 1) for z in (zx, zh))
        r, z = torch.sigmoid(x_rz + h_rz).chunk(2, 1)
        return (torch.lerp(torch.tanh(torch.addcmul(x_n, r, h_n)), h, z),)
    z_if, z_g, z_o = (zx + zh).split((2 * size, size, size), 1)
    i, f = torch.sigmoid(z_if).chunk(2, 1)
    c = torch.addcmul(f * state[1], i, torch.tanh(z_g))
    y = torch.sigmoid(z_o) * torch.tanh(F.layer_norm(c, (size,), *norm_c) if norm_c else c)
    return y if w_hr is None else linear(y, w_hr), c

"""The mathematics in plain differentiable torch: the oracle of the tests, and the second derivatives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._fallback import unpatched

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "mish": F.mish,
}


def activate(z: Tensor, activation: str | None) -> Tensor:
    """y = f(z) for an activation's name."""
    if activation not in ACTIVATIONS:
        known = ", ".join(name for name in ACTIVATIONS if name)
        raise ValueError(f"fastnn: activation must be None or one of {known}; got {activation!r}.")
    return ACTIVATIONS[activation](z)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """y = f(x Wᵀ + b); input ``[*, K]``, weight ``[N, K]`` or ``[K]``, bias ``[N]``."""
    z = torch.matmul(input, weight.t() if weight.dim() == 2 else weight)
    return activate(z if bias is None else z + bias, activation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """y = f(b + sum over the taps (r, s) of x shifted by that tap, times W[:, :, r, s]).

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[K, C / groups, R, S]``.
        bias: ``[K]`` or None.
        padding: top, bottom, left, right.
    """
    top, bottom, left, right = padding
    x = F.pad(input if input.dim() == 4 else input[None], (left, right, top, bottom))
    wide = torch.promote_types(x.dtype, torch.float32)  # sums of 16-bit numbers are kept in float32
    x = x.to(wide).reshape(x.shape[0], groups, weight.shape[1], *x.shape[2:])
    w = weight.to(wide).reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    taps = []
    height = (x.shape[-2] - (weight.shape[2] - 1) * dilation[0] - 1) // stride[0] + 1
    width = (x.shape[-1] - (weight.shape[3] - 1) * dilation[1] - 1) // stride[1] + 1
    for r in range(weight.shape[2]):
        for s in range(weight.shape[3]):
            y, z = r * dilation[0], s * dilation[1]
            rows = slice(y, y + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(z, z + (width - 1) * stride[1] + 1, stride[1])
            taps.append(torch.einsum("ngchw,gkc->ngkhw", x[..., rows, columns], w[..., r, s]))
    z = sum(taps[1:], taps[0]).flatten(1, 2)
    if bias is not None:
        z = z + bias.to(wide)[:, None, None]
    z = z[:, :0] if input.shape[-3] == 0 else z  # torch gives no channels where it gets none
    z = activate(z, activation).to(input.dtype)
    return z if input.dim() == 4 else z[0]


def winograd_magnitude(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], groups: int, tile: int
) -> Tensor:
    """Return what the error of Winograd's F(tile x tile, 3 x 3) is counted against, for each output.

    sum over c of max |x_c| over the (tile + 2)² pixels that the output's tile reads, times sum over taps of |W_c|, plus
    |b|. Arguments as :func:`conv2d`'s, for an input with a batch.
    """
    top, bottom, left, right = padding
    rows, columns = input.shape[2] + top + bottom - 2, input.shape[3] + left + right - 2  # of the output
    fill = [-size % tile for size in (rows, columns)]
    x = F.pad(input.double().abs(), (left, right + fill[1], top, bottom + fill[0]))
    peaks = F.max_pool2d(x, tile + 2, tile).unflatten(1, (groups, weight.shape[1]))
    sums = weight.double().abs().sum((2, 3)).unflatten(0, (groups, -1))
    z = torch.einsum("ngchw,gkc->ngkhw", peaks, sums).flatten(1, 2)
    z = z.repeat_interleave(tile, 2)[:, :, :rows].repeat_interleave(tile, 3)[..., :columns]
    return z if bias is None else z + bias.double().abs()[:, None, None]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    philox_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dropout(softmax(cap(scale · Q Kᵀ) + mask)) V and the log-sum-exp of its scores; rows that see no key give zeros.

    Shapes as in :func:`fastnn.functional.scaled_dot_product_attention`; 16-bit inputs are computed in float32.
    """
    options = (dropout_p, is_causal, scale, enable_gqa, window, softcap, philox_seed)
    return _attention(query, key, value, attn_mask, *options, unseen=0.0)[:2]


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    philox_seed: Tensor | None = None,
    average: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`attention`, and what the values are multiplied by; rows that see none of the keys give NaN.

    The weights are ``[*, H, L, S]``; with ``average`` their mean over the heads, ``[*, L, S]``.
    """
    options = (dropout_p, is_causal, scale, enable_gqa, window, softcap, philox_seed)
    unseen = math.nan if key.shape[-2] else 0.0
    output, lse, weights = _attention(query, key, value, attn_mask, *options, unseen=unseen)
    return output, lse, (weights.mean(-3) if average else weights).to(query.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Sequence[int] | None,
    softcap: float | None,
    philox_seed: Tensor | None,
    *,
    unseen: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = query.dtype
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    length, keys = query.shape[-2], key.shape[-2]
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    scores = scores.expand(*torch.broadcast_shapes(scores.shape[:-2], value.shape[:-2]), length, keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    scores = scores.to(query.dtype)
    # How far each key lies behind (below zero) or ahead of its query; the window is aligned to the last position.
    ahead = torch.arange(keys, device=query.device) - torch.arange(length, device=query.device)[:, None]
    if is_causal:
        scores = scores.masked_fill(ahead > 0, -math.inf)
    if window is not None:
        left, right = window
        ahead = ahead - (keys - length)
        if left >= 0:
            scores = scores.masked_fill(ahead < -left, -math.inf)
        if right >= 0:
            scores = scores.masked_fill(ahead > right, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0)
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), unseen or -math.inf)
    weights = scores.softmax(-1).masked_fill(blind, unseen)
    if dropout_p > 0:
        kept = attention_dropout_mask(philox_seed, dropout_p, weights.shape)
        weights = weights * kept / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return (weights @ value).to(dtype), lse, weights


def attention_dropout_mask(philox_seed: Tensor, dropout_p: float, shape: Sequence[int]) -> Tensor:
    """Which probabilities ``[*, L, S]`` attention keeps, as csrc/include/fastnn/attention.h defines it (Philox4x32-10)."""
    *lead, length, keys = shape
    low = 0xFFFFFFFF
    device = philox_seed.device
    key = torch.arange(keys, device=device)
    x = [
        (key // 32 * 8 + key % 8).expand(math.prod(lead), length, keys),
        torch.arange(length, device=device)[:, None],
        torch.arange(math.prod(lead), device=device)[:, None, None],
        torch.zeros((), dtype=torch.int64, device=device),
    ]
    k0, k1 = philox_seed.reshape(()) & low, (philox_seed.reshape(()) >> 32) & low
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57  # 64-bit products; what overflows into the sign is masked off
        x = [(b >> 32) & low ^ x[1] ^ k0, b & low, (a >> 32) & low ^ x[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    which = key % 32 // 8
    word = torch.where(which < 2, torch.where(which == 0, x[0], x[1]), torch.where(which == 2, x[2], x[3]))
    return (word >= min(int(dropout_p * 2**32), low)).reshape(shape)


def _no_autocast(tensors: Sequence[Tensor | None]) -> contextlib.AbstractContextManager:
    """Let a formula compute in the dtypes that it gets: a backward may run inside autocast's region, and the forward cast."""
    device = next(t.device.type for t in tensors if t is not None)
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


@unpatched()
def vjp(
    f: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The backward of f by autograd: its vector-Jacobian product, differentiable again when grad mode is on.

    Args:
        f: differentiable torch code, ``f(*inputs)`` gives a tensor.
        inputs: f's arguments; None where an optional tensor is absent.
        grad_output: the gradient of f's result.
        wanted: for each input, whether its gradient is wanted.

    Returns:
        The gradient of each input, None where it is not wanted or f does not depend on it.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _no_autocast(inputs):
        # Aliases, so that the derivative is taken at this place of the graph and not through its history.
        xs = [_alias(x) if want else x for x, want in zip(inputs, wanted, strict=True)]
        chosen = [x for x, want in zip(xs, wanted, strict=True) if want]
        grads = torch.autograd.grad(f(*xs), chosen, grad_output, create_graph=create_graph, allow_unused=True)
    found = iter(grads)
    return tuple(next(found) if want else None for want in wanted)


@unpatched()  # served, the formula of a derivative would ask for itself
def vjp_of_vjp(
    f: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The backward of a backward: f's vector-Jacobian product, differentiated by autograd.

    With ``g = vjp(f)(inputs, grad_outputs)``, returns the gradients of ``sum(grad_grads · g)``. They are differentiable
    again when grad mode is on.

    Args:
        f: differentiable torch code, ``f(*inputs)`` gives a tensor or a tuple of them.
        inputs: f's arguments; None where an optional tensor is absent.
        grad_outputs: one for each output of f, None for an output without a gradient.
        wanted: for each input, whether the backward returned a gradient for it.
        grad_grads: for each input, the gradient that arrived for its gradient, or None.

    Returns:
        Gradients of the ``grad_outputs`` and of the ``inputs``, None where there is none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _no_autocast(inputs):
        # Aliases, so that the derivative is taken at this place of the graph and not through its history.
        xs = [_alias(x) for x in inputs]
        gs = [_alias(g) for g in grad_outputs]
        outputs = f(*xs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, gs, strict=True) if g is not None and y.requires_grad]
        chosen = [i for i, want in enumerate(wanted) if want and grad_grads[i] is not None and xs[i] is not None]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], [xs[i] for i in chosen], [g for _, g in pairs], create_graph=True, allow_unused=True
        )
        live = [
            (grad, grad_grads[i])
            for grad, i in zip(grads, chosen, strict=True)
            if grad is not None and grad.requires_grad
        ]
        targets = [t for t in (*gs, *xs) if t is not None and t.requires_grad]  # no masks of bool
        found = (
            torch.autograd.grad(
                [grad for grad, _ in live],
                targets,
                [grad_grad for _, grad_grad in live],
                create_graph=create_graph,
                allow_unused=True,
            )
            if live
            else [None] * len(targets)
        )
    results = iter(found)
    spread = [next(results) if t is not None and t.requires_grad else None for t in (*gs, *xs)]
    return tuple(spread[: len(gs)]), tuple(spread[len(gs) :])


def _alias(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_(x.is_floating_point())


def _normed(z: Tensor) -> Tensor:
    """(z - mean) / sqrt(variance + 1e-5), of each row."""
    centred = z - z.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


def rnn_step(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    norms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step of a recurrent layer: x ``[B, I]``, h ``[B, P]``, c ``[B, H]`` (LSTM) to the next h and c.

    ``weights`` is ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``; ``norms``, of a layer with layer norm, ``norm_ih, norm_hh``, and
    for LSTM ``norm_c_weight, norm_c_bias``.
    """
    zx, zh = x @ weights[0].t(), h @ weights[1].t()
    if norms is not None:
        zx, zh = _normed(zx) * norms[0], _normed(zh) * norms[1]
    if len(weights) >= 4:
        zx, zh = zx + weights[2], zh + weights[3]
    if mode == "RNN_TANH":
        return torch.tanh(zx + zh), None
    if mode == "RNN_RELU":
        return torch.relu(zx + zh), None
    if mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = zx.chunk(3, 1), zh.chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return (1 - z) * n + z * h, None
    i, f, g, o = (zx + zh).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c if norms is None else _normed(c) * norms[2] + norms[3])
    return (h @ weights[-1].t() if len(weights) % 2 else h), c


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    zoneout: float | Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One recurrent layer over a sequence: the op ``fastnn::rnn``, and with zoneout and layer norm.

    Args:
        input: ``[steps, batch, I]``; ``[rows, I]`` of a packed sequence with batch_sizes; ``[batch, I]`` for one step.
        batch_sizes: ``[steps]``, not increasing, or None.
        hx, cx: ``[directions, batch, P]`` and ``[directions, batch, H]``; without directions for one step.
        weights: for each direction as :func:`rnn_step` takes them.
        mode: ``RNN_TANH RNN_RELU LSTM GRU``.
        zoneout: m of ``h_t = m h_{t-1} + (1 - m) h̃_t``: a number, ``[directions, rows, P]`` of zeros and ones, or None: 0.
        norms: for each direction as :func:`rnn_step` takes them, or None.

    Returns:
        output, h_n (empty for one step), c_n (empty but for LSTM).
    """
    empty = input.new_empty(0)
    if input.dim() == 2 and batch_sizes is None:
        h, c = rnn_step(input, hx, cx, weights, mode)
        return h, empty, empty if c is None else c
    directions = hx.shape[0]
    each = len(weights) // directions
    xs = list(input) if batch_sizes is None else list(input.split(batch_sizes.tolist()))
    outputs, h_n, c_n = [], [], []
    for d in range(directions):
        w = weights[d * each : (d + 1) * each]
        own = None if norms is None else norms[d * len(norms) // directions :]
        h, c, ys = hx[d], None if cx is None else cx[d], [xs[0]] * len(xs)
        kept = zoneout[d].split([len(x) for x in xs]) if isinstance(zoneout, Tensor) else [zoneout] * len(xs)
        for t in range(len(xs)) if d == 0 else reversed(range(len(xs))):
            n = len(xs[t])
            y, cell = rnn_step(xs[t], h[:n], None if c is None else c[:n], w, mode, own)
            ys[t] = y = y if zoneout is None else kept[t] * h[:n] + (1 - kept[t]) * y
            h = torch.cat((y, h[n:]))
            c = None if c is None else torch.cat((cell, c[n:]))
        outputs.append(torch.stack(ys) if batch_sizes is None else torch.cat(ys))
        h_n.append(h)
        c_n.append(c)
    return torch.cat(outputs, -1), torch.stack(h_n), empty if cx is None else torch.stack(c_n)

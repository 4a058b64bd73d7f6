"""The mathematics in plain differentiable torch: the oracle of the tests, and the second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    z = activate(z, activation).to(input.dtype)
    return z if input.dim() == 4 else z[0]


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
    with torch.enable_grad():
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
        live = [(grad, grad_grads[i]) for grad, i in zip(grads, chosen, strict=True) if grad is not None and grad.requires_grad]
        targets = [t for t in (*gs, *xs) if t is not None]
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
    spread = [next(results) if t is not None else None for t in (*gs, *xs)]
    return tuple(spread[: len(gs)]), tuple(spread[len(gs) :])


def _alias(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_(x.is_floating_point())

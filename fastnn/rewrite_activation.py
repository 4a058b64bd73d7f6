"""Finds an activation that follows a node of a captured graph, by what it computes: any spelling is the same to it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from fastnn import reference
from fastnn.rewrite import called, following, same, value

_ELEMENTWISE = set(
    "abs add clamp clamp_max clamp_min div elu erf exp expm1 gelu gt ge lt le hardsigmoid hardswish hardtanh leaky_relu log "
    "log1p logsigmoid maximum minimum mish mul multiply neg pow relu relu6 rsub sigmoid silu softplus sqrt square sub "
    "subtract tanh truediv true_divide where iadd imul isub itruediv expit special_expit".split()
)
_LONGEST = 12  # nodes of an activation written by hand
_PROBE = torch.cat(
    [torch.linspace(-21, 21, 43, dtype=torch.float64) * 0.37, torch.tensor([40.0, -40.0], dtype=torch.float64)]
)


def activation_after(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """Find what follows a node and is an activation in any spelling: its name, and the nodes that compute it."""
    region, chain = {node}, []
    own = value(node)
    for follower in itertools.islice(following(node), 200):
        inputs = follower.all_input_nodes
        if not inputs or not region.issuperset(inputs):
            if not any(u not in region for n in region for u in n.users):
                break
            continue
        out = value(follower)
        if called(follower) in _ELEMENTWISE and isinstance(out, Tensor) and out.dtype in (own.dtype, torch.bool):
            region.add(follower)
            chain.append(follower)
            if len(chain) == _LONGEST:
                break
    for count in range(len(chain), 0, -1):
        part = _ending_in(chain[:count], node)
        last = part[-1]
        if value(last).dtype != own.dtype or not same(value(last), own.shape):
            continue
        if any(user not in part for n in (node, *part[:-1]) for user in n.users):
            continue
        name = _named(node, part, bool(own.requires_grad or value(last).requires_grad))
        if name is not None:
            return name, part
    return None


def _ending_in(chain: list[fx.Node], start: fx.Node) -> list[fx.Node]:
    """The nodes of a chain that its last one is computed from."""
    needed = {chain[-1]}
    for node in reversed(chain):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [n for n in chain if n in needed]


def _named(start: fx.Node, chain: list[fx.Node], with_grad: bool) -> str | None:
    """The activation of fastnn that nodes compute, told by their values (and slopes) at some points; None if it is none."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.enable_grad(), torch.device("cpu"):
        x = _PROBE.clone().requires_grad_(with_grad)
        try:
            y = _run(start, chain, x * 1.0)
        except Exception:  # an argument that is no number: not an activation
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            return None
        slope = torch.autograd.grad(y.sum(), x)[0] if with_grad and y.requires_grad else None
        for name in reference.ACTIVATIONS:
            if name is None:
                continue
            expected = reference.activate(x, name)
            if torch.allclose(y, expected, rtol=1e-7, atol=1e-7):
                if slope is None:
                    return name
                expected_slope = torch.autograd.grad(expected.sum(), x)[0]
                return name if torch.allclose(slope, expected_slope, rtol=1e-6, atol=1e-6) else None
    return None


def _run(start: fx.Node, chain: list[fx.Node], x: Tensor) -> Any:
    env: dict[fx.Node, Any] = {start: x}
    for node in chain:
        args, kwargs = (fx.node.map_arg(a, env.__getitem__) for a in (node.args, node.kwargs))
        if node.op == "call_method":
            env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return env[chain[-1]]

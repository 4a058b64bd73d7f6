"""Fuses into a linear or conv2d of a captured graph what follows it: a bias, a batch norm in evaluation, an activation.

An activation is found by what its nodes compute, so that any spelling is the same.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastnn import reference
from fastnn.rewrite import Rewriter, Served, argument, called, changes_its_input, following, only_user, same, value

_LINEAR = (torch.ops.fastnn.linear, torch.ops.fastnn.linear.default)
_CONV2D = (torch.ops.fastnn.conv2d, torch.ops.fastnn.conv2d.default)
# fmt: off
_ELEMENTWISE = {
    "abs", "add", "clamp", "clamp_max", "clamp_min", "div", "elu", "erf", "exp", "expm1", "gelu", "gt", "ge", "lt",
    "le", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "logsigmoid", "maximum", "minimum",
    "mish", "mul", "multiply", "neg", "pow", "relu", "relu6", "rsub", "sigmoid", "silu", "softplus", "sqrt", "square",
    "sub", "subtract", "tanh", "truediv", "true_divide", "where", "iadd", "imul", "isub", "itruediv", "expit",
    "special_expit",
}
# fmt: on
_LONGEST = 12  # nodes of an activation written by hand
_PROBE = torch.cat(
    [torch.linspace(-21, 21, 43, dtype=torch.float64) * 0.37, torch.tensor([40.0, -40.0], dtype=torch.float64)]
)


def fuse_epilogues(rewriter: Rewriter) -> None:
    """Draw bias, batch norm and activation into the linear or conv2d before them."""
    for node in list(rewriter.graph.nodes):
        if node.target not in _LINEAR + _CONV2D or len(node.args) < 5:
            continue
        step: fx.Node | None = node
        while step is not None:
            node, step = step, _bias(rewriter, step) or _norm(rewriter, step) or _activation(rewriter, step)


def _bias(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """x Wᵀ, then + b."""
    x, weight, bias, activation, *rest = node.args
    add = only_user(node)
    if node.target not in _LINEAR or bias is not None or activation or add is None or len(add.args) != 2:
        return None
    if called(add) not in ("add", "iadd") or add.kwargs.get("alpha", 1) != 1:
        return None
    if changes_its_input(add) and add.args[0] is not node:
        return None
    bias = add.args[1] if add.args[0] is node else add.args[0]
    b, w, y = value(bias), value(weight), value(node)
    if not (isinstance(b, Tensor) and b.dim() == 1 and w.dim() == 2 and b.dtype == y.dtype and same(b, w.shape[:1])):
        return None
    return _move(rewriter, node, add, (x, weight, bias, activation, *rest), "bias", [add])


def _norm(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A batch norm in evaluation is a factor and a shift for each channel."""
    norm = only_user(node)
    at = 7 if node.target in _CONV2D else 3  # where the activation stands
    if norm is None or called(norm) != "batch_norm" or norm.target is not F.batch_norm or node.args[at] is not None:
        return None
    mean, var, factor, shift = (argument(norm, i, n) for i, n in
                                ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias")))  # fmt: skip
    weight, bias = node.args[1:3]
    w, y = value(weight), value(node)
    parts = [value(t) for t in (bias, mean, var, factor, shift) if t is not None]
    if norm.args[0] is not node or argument(norm, 5, "training", False) is not False or None in (mean, var):
        return None
    if not all(isinstance(t, Tensor) and t.dtype == w.dtype for t in parts) or w.dim() < 2:
        return None
    if y.dim() != w.dim() or value(mean).requires_grad or value(var).requires_grad:
        return None
    if _count(w) > _count(y):  # to scale the weights at each call would cost more than to scale the output
        return None
    if not rewriter.quiet(node, norm, [norm]):
        return None
    folded, _ = rewriter.inline(
        _folded, (weight, bias, mean, var, factor, shift, argument(norm, 7, "eps", 1e-5)), {}, norm
    )
    if folded is NotImplemented:
        return None
    return _move(rewriter, node, norm, (node.args[0], *folded, *node.args[3:]), "batch norm", [norm])


def _activation(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    at = 7 if node.target in _CONV2D else 3
    if node.args[at] is not None or len(node.users) == 0:
        return None
    found = activation_after(node)
    if found is None:
        return None
    name, chain = found
    return _move(rewriter, node, chain[-1], (*node.args[:at], name, *node.args[at + 1 :]), name, chain)


def _move(
    rewriter: Rewriter, node: fx.Node, last: fx.Node, args: tuple, what: str, chain: list[fx.Node]
) -> fx.Node | None:
    """Let the op with other arguments take the place of ``last``, the end of a chain that began with it."""
    if not rewriter.quiet(node, last, chain):
        return None
    with rewriter.graph.inserting_before(last):
        new = rewriter.graph.call_function(node.target, args)
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    rewriter.erase([node, *chain])
    entry = rewriter.entries.pop(node, None)
    if entry is None:  # the caller's own call of fastnn
        entry = Served("fastnn", str(called(node)))
        rewriter.report.served.append(entry)
    entry.fused.append(what)
    rewriter.entries[new] = entry
    return new


def _folded(weight, bias, mean, var, factor, shift, eps):
    """``norm(W x + b) = (W s) x + ((b - mean) s + shift)``, s = factor / sqrt(var + eps)."""
    scale = torch.rsqrt(var + eps)
    if factor is not None:
        scale = scale * factor
    moved = (-mean if bias is None else bias - mean) * scale
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), moved if shift is None else moved + shift


def _count(tensor: Tensor) -> int:
    """How many elements, about: symbolic sizes count as they were when the graph was captured."""
    n = 1
    for size in tensor.shape:
        n *= size.node.hint or 1 if isinstance(size, torch.SymInt) else size
    return n


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

"""Finds attention written by hand in a captured graph, softmax(Q Kᵀ · scale + mask) V, and lets fastnn's kernel compute it.

From the last product back: casts, dropout, softmax over the keys, then masks (added, filled in, chosen by where), a soft cap
and factors down to the product of queries and keys. Any of them may be missing; each may be a function or a method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fastnn import _fallback, functional
from fastnn.rewrite import Rewriter, argument, called, changes_its_input, only_user, same, value

_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous"}
_HIDDEN = -1e4  # a score filled in that is no greater than this hides its key, as -inf does


@dataclass
class Scores:
    """Q Kᵀ · scale + masks, taken apart."""

    query: fx.Node
    key_t: fx.Node  # [*, E, S]
    scale: float = 1.0
    softcap: float | None = None
    added: list[fx.Node] = field(default_factory=list)
    filled: list[tuple[fx.Node, bool, float]] = field(default_factory=list)  # mask, the truth that hides, by what
    nodes: list[fx.Node] = field(default_factory=list)  # all that become the kernel's

    @property
    def masked(self) -> bool:
        return bool(self.added or self.filled)


def fuse_attention(rewriter: Rewriter) -> None:
    """Replace every attention written by hand; what only looks like one is written down with the reason."""
    for node in list(rewriter.graph.nodes):
        if not node._erased and product(node) is not None:
            _fuse(rewriter, node)


def product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product of batches of matrices."""
    if not isinstance(node, fx.Node) or called(node) not in ("matmul", "bmm", "__matmul__") or len(node.args) != 2:
        return None
    left, right = node.args
    if node.kwargs or not all(isinstance(value(t), Tensor) and value(t).dim() >= 3 for t in (left, right, node)):
        return None
    return left, right


def _fuse(rewriter: Rewriter, node: fx.Node) -> None:
    weights, values = product(node)  # type: ignore[misc]
    nodes: list[fx.Node] = []
    dropout_p = 0.0
    step = _past_casts(weights, nodes)
    if called(step) == "dropout":
        p, training = argument(step, 1, "p", 0.5), argument(step, 2, "training", argument(step, 2, "train", True))
        if not isinstance(p, (int, float)) or not isinstance(training, bool):
            return
        dropout_p = float(p) if training else 0.0
        nodes.append(step)
        step = _past_casts(step.args[0], nodes)
    if called(step) != "softmax" or not isinstance(step.args[0], fx.Node):
        return
    over = argument(step, 1, "dim")
    if over not in (-1, value(step).dim() - 1 if isinstance(value(step), Tensor) else -1):
        return
    nodes.append(step)
    scores = _scores(step.args[0])
    if scores is None:
        return
    scores.nodes += nodes
    reason = _reason_against(rewriter, node, scores)
    if reason is None:
        reason = _replace(rewriter, node, scores, values, dropout_p)
    if reason is not None:
        rewriter.report.left["attention by hand", reason] += 1


def _past_casts(node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    while called(node) in _CASTS and value(node) is not None and value(node).is_floating_point():
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node


def _scores(node: Any) -> Scores | None:
    """Take scores apart, from the softmax inward; None where they are none."""
    passed: list[fx.Node] = []
    node = _past_casts(node, passed)
    found = _of_product(node) if product(node) or called(node) == "baddbmm" else _of_step(node)
    if found is not None:
        found.nodes += [node, *passed]
    return found


def _of_product(node: fx.Node) -> Scores | None:
    if called(node) == "baddbmm":
        mask, left, right = (argument(node, i, name) for i, name in enumerate(("input", "batch1", "batch2")))
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or beta not in (0, 1):
            return None
        return Scores(left, right, float(alpha), added=[mask] if beta == 1 else [])
    left, right = product(node)  # type: ignore[misc]
    return Scores(left, right)


def _of_step(node: fx.Node) -> Scores | None:
    name, args = called(node), node.args
    if (
        name in ("mul", "imul", "multiply", "div", "truediv", "itruediv", "true_divide")
        and len(args) == 2
        and not node.kwargs
    ):
        inner, factor = args if isinstance(args[0], fx.Node) else args[::-1]
        if not isinstance(factor, (int, float)) or not isinstance(inner, fx.Node):
            return None
        if "div" in name and (inner is not args[0] or factor == 0):
            return None
        factor = 1 / factor if "div" in name else float(factor)
        if called(inner) == "tanh":
            found = _scores(inner.args[0])
            if found is None or found.masked or found.softcap is not None or factor <= 0:
                return None
            found.scale, found.softcap = found.scale * factor, factor
            found.nodes.append(inner)
            return found
        found = _scores(inner)
        if found is None or found.masked or found.softcap is not None:
            return None
        found.scale *= factor
        return found
    if name in ("add", "iadd") and len(args) == 2 and not node.kwargs:
        for inner, mask in (args, args[::-1]):
            if isinstance(value(mask), Tensor) and isinstance(inner, fx.Node):
                found = _scores(inner)
                if found is not None:
                    if changes_its_input(node) and inner is not args[0]:
                        return None
                    found.added.append(mask)  # type: ignore[arg-type]
                    return found
        return None
    if name == "masked_fill":
        mask, fill = argument(node, 1, "mask"), _number(argument(node, 2, "value"))
        return _filled(_scores(args[0]), mask, True, fill)
    if name == "where" and len(args) == 3:
        if node.op == "call_method":  # scores.where(mask, other)
            return _filled(_scores(args[0]), args[1], False, _number(args[2]))
        mask, yes, no = args
        if _number(no) is not None:
            return _filled(_scores(yes), mask, False, _number(no))
        return _filled(_scores(no), mask, True, _number(yes)) if _number(yes) is not None else None
    return None


def _filled(found: Scores | None, mask: Any, hides: bool, fill: float | None) -> Scores | None:
    if found is None or fill is None or not isinstance(value(mask), Tensor):
        return None
    found.filled.append((mask, hides, fill))
    return found


def _number(x: Any) -> float | None:
    """A number, or the number that a tensor without dimensions was made of in the graph."""
    if isinstance(x, fx.Node) and called(x) in ("tensor", "scalar_tensor", "full"):
        if isinstance(value(x), Tensor) and value(x).dim() == 0:
            x = argument(x, 1, "fill_value") if called(x) == "full" else argument(x, 0, "data", x.kwargs.get("s"))
    elif isinstance(x, fx.Node) and called(x) in _CASTS:
        return _number(x.args[0])
    return float(x) if isinstance(x, (int, float)) else None


def _reason_against(rewriter: Rewriter, node: fx.Node, scores: Scores) -> str | None:
    """Why the kernel may not compute these scores, or None."""
    weights, values = product(node)  # type: ignore[misc]
    chain = [n for n in rewriter.graph.nodes if n in scores.nodes]
    if only_user(weights) is not node:
        return "its weights are used elsewhere"
    if any(only_user(n) is None for n in chain):
        return "its scores are used elsewhere"
    if not rewriter.quiet(chain[0], node, chain):
        return "a tensor is changed, or autocast entered or left, in its midst"
    shape = value(chain[0]).shape
    if any(not same(value(n), shape) for n in chain):
        return "a mask makes the scores larger"
    dtype = value(node).dtype
    for mask in scores.added:
        if not value(mask).is_floating_point():
            return f"a mask of {value(mask).dtype} is added"
        if value(mask).dtype == torch.float64 and dtype != torch.float64:
            return "a mask of float64"
    for mask, _, fill in scores.filled:
        if value(mask).dtype != torch.bool:
            return f"a mask of {value(mask).dtype} chooses"
        if not fill <= _HIDDEN * 0.99:
            return f"masked scores are filled with {fill:g}, which hides nothing"
    return None


def _replace(rewriter: Rewriter, node: fx.Node, scores: Scores, values: fx.Node, dropout_p: float) -> str | None:
    dtype = value(node).dtype
    query, scores.scale = _unscaled(rewriter, scores.query, scores.scale, node)
    key_t, scores.scale = _unscaled(rewriter, scores.key_t, scores.scale, node)
    casts = [rewriter.cast(t, dtype, node) if value(t).dtype != dtype else t for t in (query, key_t, values)]

    def attention(query, key_t, value, added, filled):
        mask = _mask(query.dtype, added, filled)
        return functional.scaled_dot_product_attention(
            query, key_t.transpose(-2, -1), value, mask, dropout_p, scale=scores.scale, softcap=scores.softcap
        )

    new, added = rewriter.inline(attention, (*casts, scores.added, scores.filled), {}, node)
    if new is NotImplemented or not rewriter.replace(node, new):
        rewriter.erase([*added, *(t for t in casts if t not in (query, key_t, values))])
        return _fallback.last.reason or "its result would be of another form"
    parts = [
        what
        for what, there in (("dropout", dropout_p > 0), ("softcap", scores.softcap), ("mask", scores.masked))
        if there
    ]
    rewriter.enter(added, "attention by hand")
    rewriter.report.served[-1].fused += parts
    rewriter.erase([node, *scores.nodes])
    return None


def _unscaled(rewriter: Rewriter, node: fx.Node, scale: float, end: fx.Node) -> tuple[fx.Node, float]:
    """Past a factor that was multiplied into queries or keys before their product."""
    name, args = called(node), node.args
    if name not in ("mul", "div", "truediv") or len(args) != 2 or node.kwargs or only_user(node) is None:
        return node, scale
    inner, factor = args if isinstance(args[0], fx.Node) else args[::-1]
    if not isinstance(factor, (int, float)) or changes_its_input(node) or not isinstance(value(inner), Tensor):
        return node, scale
    if ("div" in name and (inner is not args[0] or factor == 0)) or value(inner).dtype != value(node).dtype:
        return node, scale
    if not rewriter.quiet(node, end, []):
        return node, scale
    return inner, scale / factor if "div" in name else scale * factor


def _mask(dtype: torch.dtype, added: list[Tensor], filled: list[tuple[Tensor, bool, float]]) -> Tensor | None:
    """One mask for all: bool (True is seen) where nothing is added and -inf filled in, else one to add.

    A finite number that was filled in becomes the least of float32: a row of nothing else is then the mean of the values, as
    its softmax was.
    """
    if not added and all(math.isinf(fill) for _, _, fill in filled):
        seen = None
        for mask, hides, _ in filled:
            part = mask.logical_not() if hides else mask
            seen = part if seen is None else seen & part
        return seen
    total = None
    for mask in added:
        part = mask if mask.dtype in (dtype, torch.float32) else mask.float()
        total = part if total is None else total + part
    for mask, hides, fill in filled:
        hidden = mask if hides else mask.logical_not()
        least = fill if math.isinf(fill) else torch.finfo(torch.float32).min
        part = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, least)
        total = part if total is None else total + part
    return total

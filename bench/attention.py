"""Problems of the attention family: F.scaled_dot_product_attention, tensors laid out as a model's projections leave them.

Torch's operator is given a window as a mask; it has no soft cap, so torch's side is then a model's own formula.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from bench import peer
from bench.problem import Built, Problem
from fastnn.functional import scaled_dot_product_attention
from fastnn.testing import ATTENTION, AttentionCase, seen


def cached(case: AttentionCase) -> bool:
    """Whether a few new queries meet the keys and values of a decoder's cache, which lie head by head."""
    return 16 * case.queries <= case.keys


def build(case: AttentionCase, dtype: torch.dtype) -> Built:
    generator = torch.Generator().manual_seed(0)
    kv_heads, value_dim = case.kv_heads or case.heads, case.value_dim or case.head_dim

    def heads(count, length, width):  # [batch, heads, length, width]
        x = torch.randn(case.batch, length, count, width, generator=generator).to(dtype).transpose(1, 2)
        return x.contiguous() if cached(case) else x

    query = heads(case.heads, case.queries, case.head_dim)
    key, value = heads(kv_heads, case.keys, case.head_dim), heads(kv_heads, case.keys, value_dim)
    mask, visible = None, seen(case)
    if case.mask == "bias":
        mask = torch.randn(1, case.heads, case.queries, case.keys, generator=generator).to(dtype)
    elif case.mask:  # padding: sentences of different lengths in one batch
        lengths = torch.linspace(case.keys, max(1, case.keys // 2), case.batch).long()
        real = (torch.arange(case.keys) < lengths[:, None])[:, None, None]
        mask = real if case.mask == "bool" else torch.zeros(real.shape, dtype=dtype).masked_fill(~real, -math.inf)
    options = {"is_causal": True} if case.causal else {}
    if kv_heads != case.heads:
        options["enable_gqa"] = True
    ours = {name: getattr(case, name) for name in ("window", "softcap") if getattr(case, name) is not None}
    own = partial(scaled_dot_product_attention, **options, **ours)

    def stock(query, key, value, mask):
        if case.softcap:
            return formula(query, *repeated(case, key, value), case.softcap, visible)
        return F.scaled_dot_product_attention(query, key, value, visible, **options)

    stock = stock if ours else partial(F.scaled_dot_product_attention, **options)
    onnx = partial(model, case, query, key, value, mask)
    constant = () if case.mask == "bias" else (3,)
    return Built((query, key, value, mask), own, stock, constant=constant, onnx=onnx)


def repeated(case: AttentionCase, key, value):
    """Keys and values with as many heads as the queries have."""
    return (t.repeat_interleave(case.heads // t.shape[1], 1) for t in (key, value))


def formula(query, key, value, softcap=None, visible=None, mask=None):
    """Attention as models write it, [..., L, E] with as many heads of keys as of queries."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ value


def model(case: AttentionCase, query, key, value, mask):
    """The same as an ONNX graph of plain operators. Heads that share their keys are rows of one product: no key is copied."""
    feeds = {"Q": query.numpy(), "K": key.transpose(-1, -2).contiguous().numpy(), "V": value.numpy()}
    sharing = case.heads // key.shape[1]
    weights = {
        "ROWS": torch.tensor([case.batch, key.shape[1], sharing * case.queries, case.head_dim]).numpy(),
        "SHAPE": torch.tensor([*query.shape[:-1], value.shape[-1]]).numpy(),
        "SCALE": torch.tensor(1 / math.sqrt(case.head_dim) / (case.softcap or 1)).numpy(),
    }
    nodes = [("Reshape", "Q ROWS", "R")] if sharing > 1 else []
    nodes += [("MatMul", "R K" if nodes else "Q K", "A"), ("Mul", "A SCALE", "S")]
    if case.softcap:
        weights["CAP"] = torch.tensor(case.softcap).numpy()
        nodes += [("Tanh", "S", "T"), ("Mul", "T CAP", "C")]
    mask = seen(case) if mask is None else mask
    if mask is not None:
        additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        weights["M"] = (additive if additive.dim() == 4 else additive.repeat(sharing, 1)).numpy()
        nodes.append(("Add", f"{nodes[-1][2]} M", "B"))
    nodes += [("Softmax", nodes[-1][2], "P"), ("MatMul", "P V", "O" if sharing > 1 else "OUT")]
    nodes += [("Reshape", "O SHAPE", "OUT")] if sharing > 1 else []
    return peer.model(nodes, feeds, weights)


def group(case: AttentionCase) -> str:
    if case.name.startswith("odd"):
        return ""
    if cached(case):
        return "a few queries"
    if case.causal or case.window is not None:
        return "causal or window"
    return "128 keys or fewer" if case.keys <= 128 else "more keys"


def text(case: AttentionCase) -> str:
    """Return what is computed, in a few characters."""
    kv_heads, value_dim = case.kv_heads or case.heads, case.value_dim or case.head_dim
    shape = f"{case.batch}x{case.heads}{'' if kv_heads == case.heads else f'/{kv_heads}'}x{case.queries}x{case.keys}"
    shape += f" d{case.head_dim}" + ("" if value_dim == case.head_dim else f"/{value_dim}")
    shape += " causal" * case.causal + (f" {case.mask}" if case.mask else "")
    return (
        shape + (f" window {case.window[0]},{case.window[1]}" if case.window else "") + " softcap" * bool(case.softcap)
    )


def scores(case: AttentionCase) -> int:
    """Return how many pairs of a query and a key that it sees one head has."""
    left, right = (case.keys + case.queries if side < 0 else side for side in case.window or (-1, -1))
    total = 0
    for query in range(case.queries):
        place = query + case.keys - case.queries  # of the query among the keys: the last stands at the last
        last = min(case.keys - 1, place + right, query if case.causal else case.keys)
        total += max(0, last + 1 - max(0, place - left))
    return total


def problem(case: AttentionCase) -> Problem:
    kv_heads, value_dim = case.kv_heads or case.heads, case.value_dim or case.head_dim
    flops = 2.0 * case.batch * case.heads * scores(case) * (case.head_dim + value_dim)
    elements = case.batch * (
        case.heads * case.queries * (case.head_dim + value_dim) + kv_heads * case.keys * (case.head_dim + value_dim)
    )
    elements += case.heads * case.queries * case.keys * (case.mask == "bias")
    directions = ("forward",) if cached(case) else ("forward", "training")
    return Problem(case.name, text(case), flops, elements, partial(build, case), directions, group(case))


PROBLEMS = [problem(case) for case in ATTENTION]

"""Problems of the attention family: F.scaled_dot_product_attention, tensors laid out as a model's projections leave them."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from bench import peer
from bench.problem import Built, Problem
from fastnn.functional import scaled_dot_product_attention
from fastnn.testing import ATTENTION, AttentionCase


def build(case: AttentionCase, dtype: torch.dtype) -> Built:
    generator = torch.Generator().manual_seed(0)
    kv_heads, value_dim = case.kv_heads or case.heads, case.value_dim or case.head_dim

    def heads(count, length, width):  # [batch, heads, length, width]; a decoder's key-value cache lies head by head
        x = torch.randn(case.batch, length, count, width, generator=generator).to(dtype).transpose(1, 2)
        return x.contiguous() if case.queries == 1 else x

    query = heads(case.heads, case.queries, case.head_dim)
    key, value = heads(kv_heads, case.keys, case.head_dim), heads(kv_heads, case.keys, value_dim)
    mask = None
    if case.mask:  # padding: sentences of different lengths in one batch
        lengths = torch.linspace(case.keys, max(1, case.keys // 2), case.batch).long()
        seen = (torch.arange(case.keys) < lengths[:, None])[:, None, None]
        mask = seen if case.mask == "bool" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -math.inf)
    options = {"attn_mask": mask} if case.mask else {}
    if case.causal:
        options["is_causal"] = True
    if kv_heads != case.heads:
        options["enable_gqa"] = True

    def call(function, query, key, value):
        fitting = dict(options)
        if case.mask == "additive" and query.dtype != dtype:  # the float64 oracle
            fitting["attn_mask"] = mask.to(query.dtype)
        return function(query, key, value, **fitting)

    own, stock = partial(call, scaled_dot_product_attention), partial(call, F.scaled_dot_product_attention)
    onnx = None if case.causal or kv_heads != case.heads else partial(model, query, key, value, mask)
    return Built((query, key, value), own, stock, onnx=onnx)


def model(query, key, value, mask):
    """The same as an ONNX graph of plain operators."""
    feeds = {"Q": query.numpy(), "K": key.transpose(-1, -2).contiguous().numpy(), "V": value.numpy()}
    nodes = [("MatMul", "Q K", "A"), ("Mul", "A C", "S")]
    weights = {"C": torch.tensor(1 / math.sqrt(query.shape[-1])).numpy()}
    if mask is not None:
        additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        weights["M"] = additive.numpy()
        nodes.append(("Add", "S M", "T"))
    nodes += [("Softmax", nodes[-1][2], "P"), ("MatMul", "P V", "OUT")]
    return peer.model(nodes, feeds, weights)


def problem(case: AttentionCase) -> Problem:
    kv_heads, value_dim = case.kv_heads or case.heads, case.value_dim or case.head_dim
    shape = f"{case.batch}x{case.heads}{'' if kv_heads == case.heads else f'/{kv_heads}'}x{case.queries}x{case.keys}"
    shape += f" d{case.head_dim}" + ("" if value_dim == case.head_dim else f"/{value_dim}")
    shape += " causal" * case.causal + (f" {case.mask}" if case.mask else "")
    scores = case.queries * case.keys
    if case.causal:  # query l sees l + 1 keys
        scores = sum(min(query + 1, case.keys) for query in range(case.queries))
    flops = 2.0 * case.batch * case.heads * scores * (case.head_dim + value_dim)
    elements = case.batch * (
        case.heads * case.queries * (case.head_dim + value_dim) + kv_heads * case.keys * (case.head_dim + value_dim)
    )
    directions = ("forward",) if case.queries == 1 else ("forward", "training")
    return Problem(case.name, shape, flops, elements, lambda dtype: build(case, dtype), directions)


PROBLEMS = [problem(case) for case in ATTENTION]

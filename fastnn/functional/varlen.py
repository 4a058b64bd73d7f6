"""varlen_attn: attention over a batch of sequences of different lengths, packed without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastnn.functional.attention import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend within each sequence of a packed batch: the queries of sequence i to the keys of sequence i.

    .. math:: O_i = \mathrm{softmax}(\mathrm{cap}(\mathrm{scale} \cdot Q_i K_i^T) + M_i)\, V_i

    One call of the kernel for each sequence, or without a gradient for as many as follow each other with the same lengths.
    Output and gradients are to the last bit those of :func:`fastnn.functional.scaled_dot_product_attention` on the sequence
    alone, whatever else is in the batch. The lengths are data: ``torch.compile`` breaks its graph here.

    Args:
        query: ``[Tq, H, E]``, the queries of all sequences one after another; float32, float64, bfloat16 or float16, any
            strides.
        key: ``[Tk, H, E]``, of the same dtype.
        value: ``[Tk, H, Ev]``, of the same dtype.
        cu_seq_q: ``[N + 1]``, int32 or int64: sequence i has the queries from ``cu_seq_q[i]`` to before ``cu_seq_q[i + 1]``.
            From 0 to Tq; a sequence may be empty.
        cu_seq_k: ``[N + 1]``, the same of keys and values, from 0 to Tk. None is for a ``block_table``.
        max_q, max_k: the length of the longest sequence, or more.
        return_aux: with ``lse=True``, return the log-sum-exp of the scores, too.
        scale: factor of the scores; default 1/√E.
        window_size: ``(left, right)``: query l of a sequence with L queries and S keys sees only keys from
            ``l + S - L - left`` to ``l + S - L + right``, -1 for no limit. ``(-1, 0)`` is causal attention, aligned to the
            sequence's last key.
        enable_gqa: key and value have fewer heads; each serves ``H / Hkv`` consecutive heads of query.
        seqused_k: ``[N]``, int32 or int64: only that many keys of each sequence, its first, are there. For inference.
        block_table: must be None: pages have no kernel.
        num_splits: of no effect: the result never depends on the other sequences, nor on the number of threads.
        softcap: cap(x) = softcap · tanh(x / softcap).

    Returns:
        ``[Tq, H, Ev]``, and with ``return_aux.lse`` also ``[H, Tq]`` in float32 (float64 for float64), differentiable. A query
        that may see no key gives zeros and -inf.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together; lengths that do not fit the tensors; a sequence
            longer than max_q or max_k; seqused_k where a gradient is wanted.
        ValueError: heads of key and query that differ without enable_gqa, or do not divide; a negative softcap, a window of
            another form.
        NotImplementedError: a block_table.

    Source: ``torch.nn.attention.varlen.varlen_attn``; softcap is ours.
    """
    if block_table is not None:
        raise NotImplementedError(
            "fastnn.varlen_attn: block_table must be None, pages have no kernel; got a tensor. Gather the pages first, "
            "key[block_table].flatten(0, 2) and value so, with cu_seq_k in steps of their positions in a row of block_table."
        )
    _check(query, key, value, enable_gqa)
    lengths_q = _lengths("cu_seq_q", cu_seq_q, "query", query.shape[0], "max_q", max_q)
    lengths_k = _lengths("cu_seq_k", cu_seq_k, "key", key.shape[0], "max_k", max_k)
    if len(lengths_q) != len(lengths_k):
        raise RuntimeError(
            f"fastnn.varlen_attn: cu_seq_k must be as long as cu_seq_q, {len(lengths_q) + 1}; got {len(lengths_k) + 1}."
        )
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    used_k = lengths_k if seqused_k is None else _used(seqused_k, lengths_k, needs_grad)

    sizes = list(zip(lengths_q, lengths_k, used_k, strict=True))
    if needs_grad:  # in what order the kernel adds up a gradient of query depends on how many heads there are
        runs = [(1, *size) for size in sizes]
    else:
        runs = [(len(list(same)), *size) for size, same in groupby(sizes)]
    runs = runs or [(0, 0, 0, 0)]
    return_lse = return_aux is not None and return_aux.lse
    options = dict(scale=scale, enable_gqa=enable_gqa, window=window_size, softcap=softcap, return_lse=return_lse)
    parts = _attend(query, key, value, runs, options)
    if len(runs) == 1:
        results = next(parts)
    elif needs_grad:
        results = [torch.cat(some, dim) for dim, some in enumerate(zip(*parts, strict=True))]
    else:
        results = _written(parts, query.shape[0])
    return tuple(results) if return_lse else results[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int, int, int]], options: dict
) -> Iterator[tuple[Tensor, ...]]:
    """Attend to one run after another: ``count`` sequences of the same lengths, all of them in one call.

    Yields ``[positions, H, Ev]``, and with ``return_lse`` also ``[H, positions]``, of each.
    """
    # split, as its backward is one cat; narrow would fill a gradient of full size for each run.
    queries = query.split([count * length for count, length, _, _ in runs])
    keys, values = (t.split([count * length for count, _, length, _ in runs]) for t in (key, value))
    for (count, length_q, length_k, used), q, k, v in zip(runs, queries, keys, values, strict=True):
        q = q.view(count, length_q, *q.shape[1:]).transpose(1, 2)
        k, v = (t.view(count, length_k, *t.shape[1:]).transpose(1, 2) for t in (k, v))
        if used < length_k:
            k, v = k.narrow(2, 0, used), v.narrow(2, 0, used)
        results = scaled_dot_product_attention(q, k, v, **options)
        output, *lse = results if options["return_lse"] else (results,)
        yield output.transpose(1, 2).flatten(0, 1), *(t.transpose(0, 1).flatten(1) for t in lse)


def _written(parts: Iterator[tuple[Tensor, ...]], total: int) -> list[Tensor]:
    """Write each part to its place: a cat would hold every output twice."""
    results: list[Tensor] = []
    start = 0
    for output, *lse in parts:
        if not results:
            results = [output.new_empty(total, *output.shape[1:]), *(t.new_empty(t.shape[0], total) for t in lse)]
        length = output.shape[0]
        for dim, (result, some) in enumerate(zip(results, (output, *lse), strict=True)):
            result.narrow(dim, start, length).copy_(some)
        start += length
    return results


def _check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise RuntimeError(
                f"fastnn.varlen_attn: {name} must be [positions, heads, features]; got {list(tensor.shape)}."
            )
    if value.shape[:2] != key.shape[:2]:
        raise RuntimeError(
            f"fastnn.varlen_attn: value must have key's positions and heads, {list(key.shape[:2])}; "
            f"got {list(value.shape)}."
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if not enable_gqa and heads != kv_heads:
        raise ValueError(
            f"fastnn.varlen_attn: key must have as many heads as query, {heads}; got {kv_heads}. Where heads of query "
            "share those of key, set enable_gqa=True."
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"fastnn.varlen_attn: heads of key must divide those of query, {heads}; got {kv_heads}.")


def _lengths(name: str, cu_seq: Tensor | None, of: str, total: int, limit_name: str, limit: int) -> list[int]:
    """The length of each sequence."""
    if cu_seq is None:
        raise RuntimeError(f"fastnn.varlen_attn: {name} must be a tensor where there is no block_table; got None.")
    _check_counts(name, cu_seq, "N + 1")
    ends = cu_seq.tolist()
    if not ends or ends[0] != 0 or ends[-1] != total:
        got = f"{ends[0]} and {ends[-1]}" if ends else "none"
        raise RuntimeError(
            f"fastnn.varlen_attn: {name} must begin with 0 and end with {of}'s {total} positions; got {got}."
        )
    lengths = [stop - start for start, stop in pairwise(ends)]
    if min(lengths, default=0) < 0:
        raise RuntimeError(f"fastnn.varlen_attn: {name} must not fall; got a sequence of length {min(lengths)}.")
    if max(lengths, default=0) > limit:
        raise RuntimeError(
            f"fastnn.varlen_attn: {limit_name} must be no less than the longest sequence, {max(lengths)}; got {limit}."
        )
    return lengths


def _used(seqused_k: Tensor, lengths: list[int], needs_grad: bool) -> list[int]:
    """How many keys of each sequence are there."""
    if needs_grad:
        raise RuntimeError(
            "fastnn.varlen_attn: seqused_k must be None where a gradient is wanted, it is for inference; got a tensor. "
            "Run under torch.no_grad()."
        )
    _check_counts("seqused_k", seqused_k, "N")
    used = seqused_k.tolist()
    if len(used) != len(lengths) or not all(0 <= n <= length for n, length in zip(used, lengths, strict=True)):
        raise RuntimeError(
            f"fastnn.varlen_attn: seqused_k must be 0 to the length of each of the {len(lengths)} sequences of key; "
            f"got {used}."
        )
    return used


def _check_counts(name: str, counts: Tensor, size: str) -> None:
    if counts.dim() != 1 or counts.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"fastnn.varlen_attn: {name} must be [{size}] of int32 or int64; got {list(counts.shape)} of {counts.dtype}."
        )

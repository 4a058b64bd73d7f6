"""ring_attention: attention over a sequence that is spread over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastnn import _fallback
from fastnn.functional.attention import _seed


def shard_positions(length: int, *, zigzag: bool = False, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the positions of a sequence that this process holds: ``x[:, shard_positions(x.shape[1])]`` is its shard.

    Args:
        length: of the whole sequence; a multiple of the group's size, with ``zigzag`` of twice the size.
        zigzag: of ``2 n`` equal pieces take piece r and piece ``2 n - 1 - r``, so that under a causal mask every process
            has the same work; else the r-th of n.
        group: the processes; None: all.

    Returns:
        int64, ascending.

    Raises:
        ValueError: a length that cannot be spread evenly.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    pieces = 2 * size if zigzag else size
    if length % pieces != 0:
        raise ValueError(
            f"fastnn.shard_positions: length must be a multiple of {pieces}; got {length}. Pad the sequence."
        )
    return _positions(length, rank, size, zigzag)


def _positions(length: int, rank: int, size: int, zigzag: bool) -> Tensor:
    parts = torch.arange(length).chunk(2 * size if zigzag else size)
    return torch.cat([parts[rank], parts[-1 - rank]]) if zigzag else parts[rank]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    zigzag: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Attend with this process's queries to the keys of all processes of the group (context parallelism).

    .. math:: O = \frac{\sum_j e^{\ell_j} O_j}{\sum_j e^{\ell_j}}

    with :math:`O_j, \ell_j` the attention to the j-th process's keys and the log-sum-exp of its scores. Keys and values go
    round the ring while the kernel works on those that are there; the backward sends them round once more, and their
    gradients with them. No process holds more than two shards of them. Every process of the group must call it, and its
    backward, in the same order.

    Args:
        query: ``[*, H, L, E]``, the shard of the queries; float32, float64, bfloat16 or float16.
        key: ``[*, H, S, E]``, the shard of the keys, of one shape on all processes.
        value: ``[*, H, S, Ev]``.
        attn_mask: what this process's queries may see of the keys of all n processes, in the order of the sequence:
            broadcastable to ``[*, H, L, n S]``; bool, or added to the scores. It may come with ``is_causal``, and may ask
            for a gradient, which is this process's share. A mask of padded keys is ``[batch, 1, 1, n S]``.
        dropout_p: probability of dropping a weight, drawn from this process's generator of torch.
        is_causal: a query sees the keys up to its own position in the whole sequence; L = S then.
        scale: factor of the scores; default 1/√E.
        enable_gqa: key and value have fewer heads; each serves ``H / Hkv`` consecutive heads of query.
        softcap: as in :func:`fastnn.functional.scaled_dot_product_attention`.
        zigzag: the shards are those of ``shard_positions(…, zigzag=True)``; matters to ``is_causal`` and ``attn_mask``.
        group: the processes, in the order of the sequence; None: all.

    Returns:
        ``[*, H, L, Ev]``, the shard of the output. Differentiable once: a second derivative is an error. A query that
        may see no key gives zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, or that no kernel takes.

    Source: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv 2310.01889; the zigzag of the shards:
        Brandon et al., Striped Attention, arXiv 2311.09431, and the llama 3 report, arXiv 2407.21783.
    """
    reason = _fallback.why_not(query, key, value, op="attention")
    torch._check(
        reason is None, lambda: f"fastnn.ring_attention: query, key and value must have a kernel; got: {reason}."
    )
    length, positions = query.shape[-2], key.shape[-2]
    torch._check(
        not is_causal or length == positions,
        lambda: f"fastnn.ring_attention: key must have query's {length} positions where is_causal; got {positions}.",
    )
    torch._check(
        positions > 0 and not (is_causal and zigzag and positions % 2),
        lambda: f"fastnn.ring_attention: key must have positions, an even number with zigzag; got {positions}.",
    )
    ring = _Ring(group)
    if attn_mask is not None:
        attn_mask = _whole_mask(attn_mask, length, ring.size * positions)
    seed = _seed(query, dropout_p)
    options = (dropout_p, is_causal, scale, enable_gqa, softcap, zigzag)
    return _RingAttention.apply(query, key, value, attn_mask, seed, options, ring)


def _whole_mask(attn_mask: Tensor, length: int, positions: int) -> Tensor:
    """``[…, 1 or L, n S]``: what is the same for all queries stays one row."""
    torch._check(
        attn_mask.dim() >= 2 and attn_mask.shape[-2] in (1, length) and attn_mask.shape[-1] in (1, positions),
        lambda: (
            "fastnn.ring_attention: attn_mask must be broadcastable to the queries of this process and the keys of all, "
            f"[{length}, {positions}]; got {list(attn_mask.shape)}."
        ),
    )
    return attn_mask.expand(*attn_mask.shape[:-1], positions)


class _Ring:
    """The neighbours of this process in a group."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        self.next, self.previous = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]

    def pass_on(self, tensors: list[Tensor]):
        """Start sending ``tensors`` to the next process; the function returned waits for those of the previous one.

        The caller keeps ``tensors`` until then.
        """
        arriving = [torch.empty_like(t) for t in tensors]
        sends = [dist.P2POp(dist.isend, t, self.next, self.group) for t in tensors]
        receives = [dist.P2POp(dist.irecv, t, self.previous, self.group) for t in arriving]
        works = dist.batch_isend_irecv(sends + receives)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return arriving

        return wait

    def blocks(self, tensors: list[Tensor]):
        """Yield, for each process from this one backwards, its rank and its ``tensors``; the next are on their way."""
        for step in range(self.size):
            wait = self.pass_on(tensors) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, tensors
            if wait:
                tensors = wait()


def _parts(rank: int, other: int, is_causal: bool, zigzag: bool, half: int):
    """What of the queries of ``rank`` sees what of the keys of ``other``, and whether by their order; None: nothing."""
    everything, first, last = slice(None), slice(half), slice(half, None)
    if not is_causal or rank == other:
        return everything, everything, is_causal
    if not zigzag:
        return (everything, everything, False) if other < rank else None
    return (everything, first, False) if other < rank else (last, everything, False)


def _meeting(ring: _Ring, other: int, positions: int, attn_mask: Tensor | None, seed: Tensor | None, options: tuple):
    """What meets of the queries here and of another's keys: rows, columns, its place in the mask, the op's options.

    None: nothing.
    """
    dropout_p, is_causal, scale, enable_gqa, softcap, zigzag = options
    parts = _parts(ring.rank, other, is_causal, zigzag, positions // 2)
    if parts is None:
        return None
    rows, columns, ordered = parts
    place = None
    if attn_mask is not None:
        at = _positions(ring.size * positions, other, ring.size, zigzag)[columns].to(attn_mask.device)
        place = (..., rows if attn_mask.shape[-2] > 1 else slice(None), at)
    if seed is not None:  # no two blocks drop alike, even where all processes were seeded alike
        seed = seed + (ring.rank * ring.size + other)
    window = (-1, 0) if ordered else None  # is_causal, beside which there may be a mask
    return rows, columns, place, (dropout_p, False, scale, enable_gqa, window, softcap, seed)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask, seed, options, ring):
        output: Any = None
        lse: Any = None
        for other, (k, v) in ring.blocks([key.contiguous(), value.contiguous()]):
            met = _meeting(ring, other, key.shape[-2], attn_mask, seed, options)
            if met is None:
                continue
            rows, columns, place, rest = met
            mask = None if attn_mask is None else attn_mask[place]
            q, k, v = query[..., rows, :], k[..., columns, :], v[..., columns, :]
            block, block_lse = torch.ops.fastnn.attention(q, k, v, mask, *rest)
            if output is None:  # of this process's own keys
                output, lse = block.to(block_lse.dtype), block_lse
                continue
            old = lse[..., rows]
            new = torch.logaddexp(old, block_lse)
            base = new.masked_fill(new == -math.inf, 0.0)  # of a query that has seen no key yet
            kept = output[..., rows, :]
            kept.mul_((old - base).exp_().unsqueeze(-1)).add_(block * (block_lse - base).exp_().unsqueeze(-1))
            old.copy_(new)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, attn_mask, seed, output, lse)
        ctx.options, ctx.ring = options, ring
        return output

    @staticmethod
    def backward(ctx, grad_output):
        with torch.no_grad():
            grads = _RingAttention._gradients(ctx, grad_output)
        if torch.is_grad_enabled():
            grads = _Once.apply(grads, grad_output, *ctx.saved_tensors[:4])
        return *grads, None, None, None

    @staticmethod
    def _gradients(ctx, grad_output):
        query, key, value, attn_mask, seed, output, lse = ctx.saved_tensors
        ring, wait = ctx.ring, None
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        grads = [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (key, value)]
        grad_mask = torch.zeros_like(attn_mask) if ctx.needs_input_grad[3] else None
        for other, (k, v) in ring.blocks([key.contiguous(), value.contiguous()]):
            met = _meeting(ring, other, key.shape[-2], attn_mask, seed, ctx.options)
            found: Sequence[Tensor] = ()
            if met is not None:
                rows, columns, place, rest = met
                *found, of_mask = torch.ops.fastnn.attention_backward(
                    grad_output[..., rows, :],
                    None,
                    query[..., rows, :],
                    k[..., columns, :],
                    v[..., columns, :],
                    None if attn_mask is None else attn_mask[place],
                    output[..., rows, :],
                    lse[..., rows],
                    *rest,
                    [True, True, True, grad_mask is not None],
                )
                grad_query[..., rows, :] += found[0]
                if grad_mask is not None:
                    grad_mask[place] = of_mask  # of these keys, which come but once
            if wait:
                grads = wait()  # of these keys and values, from the processes that they passed
            for grad, share in zip(grads, found[1:], strict=False):
                grad[..., columns, :] += share
            wait = ring.pass_on(grads) if ring.size > 1 else None
        if wait:
            grads = wait()
        grads = [grad.to(t.dtype) for grad, t in zip((grad_query, *grads), (query, key, value), strict=True)]
        return [*grads, grad_mask]


class _Once(torch.autograd.Function):
    """Gradients as they are, and an error where they are differentiated."""

    @staticmethod
    def forward(ctx, grads, *tensors):
        return tuple(grads)

    @staticmethod
    def backward(ctx, *grad_grads):
        raise RuntimeError(
            "fastnn.ring_attention: its gradient must not be differentiated; got a second derivative. Use "
            "fastnn.functional.scaled_dot_product_attention on the whole sequence."
        )

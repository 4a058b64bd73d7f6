"""ring_attention: attention over a sequence that is spread over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnn import _fallback
from fastnn.functional.attention import scaled_dot_product_attention


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
    parts = torch.arange(length).chunk(pieces)
    return torch.cat([parts[rank], parts[-1 - rank]]) if zigzag else parts[rank]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
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
        is_causal: a query sees the keys up to its own position in the whole sequence; L = S then.
        scale: factor of the scores; default 1/√E.
        enable_gqa: key and value have fewer heads; each serves ``H / Hkv`` consecutive heads of query.
        softcap: as in :func:`fastnn.functional.scaled_dot_product_attention`.
        zigzag: the shards are those of ``shard_positions(…, zigzag=True)``; matters to ``is_causal`` only.
        group: the processes, in the order of the sequence; None: all.

    Returns:
        ``[*, H, L, Ev]``, the shard of the output. Differentiable once.

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
    return _RingAttention.apply(query, key, value, is_causal, (scale, enable_gqa, softcap), zigzag, _Ring(group))


class _Ring:
    """The neighbours of this process in a group."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        whole = group or dist.group.WORLD
        self.next, self.previous = (dist.get_global_rank(whole, (self.rank + i) % self.size) for i in (1, -1))

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


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, is_causal, options, zigzag, ring):
        scale, enable_gqa, softcap = options
        output = lse = None
        for other, (k, v) in ring.blocks([key.contiguous(), value.contiguous()]):
            parts = _parts(ring.rank, other, is_causal, zigzag, key.shape[-2] // 2)
            if parts is None:
                continue
            rows, columns, ordered = parts
            q, k, v = query[..., rows, :], k[..., columns, :], v[..., columns, :]
            block, block_lse = scaled_dot_product_attention(
                q, k, v, None, 0.0, ordered, scale, enable_gqa, softcap=softcap, return_lse=True
            )
            if output is None:  # of this process's own keys: every query sees some
                output, lse = block.to(block_lse.dtype), block_lse
                continue
            old = lse[..., rows]
            new = torch.logaddexp(old, block_lse)
            kept = output[..., rows, :]
            kept.mul_((old - new).exp_().unsqueeze(-1)).add_(block * (block_lse - new).exp_().unsqueeze(-1))
            old.copy_(new)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.is_causal, ctx.options, ctx.zigzag, ctx.ring = is_causal, options, zigzag, ring
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, lse = ctx.saved_tensors
        scale, enable_gqa, softcap = ctx.options
        ring, wait = ctx.ring, None
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        grads = [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (key, value)]
        for other, (k, v) in ring.blocks([key.contiguous(), value.contiguous()]):
            parts = _parts(ring.rank, other, ctx.is_causal, ctx.zigzag, key.shape[-2] // 2)
            found = ()
            if parts is not None:
                rows, columns, ordered = parts
                found = torch.ops.fastnn.attention_backward(
                    grad_output[..., rows, :],
                    None,
                    query[..., rows, :],
                    k[..., columns, :],
                    v[..., columns, :],
                    None,
                    output[..., rows, :],
                    lse[..., rows],
                    0.0,
                    ordered,
                    scale,
                    enable_gqa,
                    None,
                    softcap,
                    None,
                    [True, True, True, False],
                )[:3]
                grad_query[..., rows, :] += found[0]
            if wait:
                grads = wait()  # of these keys and values, from the processes that they passed
            for grad, share in zip(grads, found[1:], strict=False):
                grad[..., columns, :] += share
            wait = ring.pass_on(grads) if ring.size > 1 else None
        if wait:
            grads = wait()
        grads = [grad.to(t.dtype) for grad, t in zip((grad_query, *grads), (query, key, value), strict=True)]
        return (*grads, None, None, None, None)

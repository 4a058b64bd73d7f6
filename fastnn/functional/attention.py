"""scaled_dot_product_attention: scores, softmax and the weighted sum of values in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn import _export, _fallback, reference
from fastnn._library import _C
from fastnn.functional import _transforms
from fastnn.functional._attention import Attention, Options

if TYPE_CHECKING:
    from fastnn.nn.kv_cache import KVCache


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor | KVCache,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend with every query to the keys, without the score matrix ever being in memory as a whole.

    .. math:: O = \mathrm{dropout}(\mathrm{softmax}(\mathrm{cap}(\mathrm{scale} \cdot Q K^T) + M))\, V

    Args:
        query: ``[*, H, L, E]``; float32, float64, bfloat16 or float16, any strides. Leading dimensions (none, heads,
            batch and heads, …) are broadcast.
        key: ``[*, H, S, E]``, of the same dtype. Or a :class:`fastnn.nn.KVCache`, whose keys and values are read where
            they lie; its heads may be fewer than those of query, without ``enable_gqa``.
        value: ``[*, H, S, Ev]``, of the same dtype; None with a cache.
        attn_mask: M, broadcastable to ``[*, H, L, S]``: bool (True where the query may see the key), or added to the
            scores, of float32 or query's dtype. An additive mask may ask for a gradient.
        dropout_p: probability of dropping a weight, drawn from torch's generator; applied whatever the caller's mode.
        is_causal: query l sees keys 0 … l. Not together with ``attn_mask``. Over a cache, where the queries are the last
            positions, query l sees keys 0 … l + S - L, as with ``window=(-1, 0)``, and a mask may come with it.
        scale: factor of the scores; default 1/√E.
        enable_gqa: key and value have fewer heads; each serves ``H / Hkv`` consecutive heads of query.
        window: ``(left, right)`` or one number for both: query l sees only keys from ``l + S - L - left`` to
            ``l + S - L + right``, -1 for no limit. As in flash-attention, the last query stands at the last key, so
            ``(-1, 0)`` is causal attention aligned to the end of a key-value cache. Further to mask and is_causal.
        softcap: cap(x) = softcap · tanh(x / softcap), before the mask is added.
        return_lse: return the log-sum-exp of the scores, too.

    Returns:
        ``[*, H, L, Ev]``, and with ``return_lse`` also ``[*, H, L]`` in float32 (float64 for float64), differentiable.
        A query that may see no key gives zeros and -inf. Four-dimensional outputs lie in memory as query does
        (heads inside positions or positions inside heads).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together; attn_mask together with is_causal;
            dropout_p outside 0 … 1.
        IndexError: enable_gqa without a dimension of heads.
        ValueError: a negative softcap, a window of another form.
        TypeError: an argument that is no tensor.

    Source: ``torch.nn.functional.scaled_dot_product_attention``; kernels in ``csrc/cpu/attention*.inl``
        and ``csrc/cuda/attention*.cuh``.
    """
    if window is not None:
        window = (window, window) if isinstance(window, int) else tuple(window)
    if value is None:
        key, value, window = _read(key, is_causal, window)
        is_causal, enable_gqa = False, True
    if _export.tracing():
        output = None
        if _served(query, key, value, attn_mask, "attention"):
            seed = _seed(query, dropout_p)
            output = _export.ops().attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, seed
            )
            output = output if return_lse else output[0]
    else:
        output = _C.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse
        )
        if output is None and _transforms.active() and _served(query, key, value, attn_mask, "attention"):
            op = Attention(dropout_p, is_causal, scale, enable_gqa, window, softcap)
            tensors = (query, key, value, attn_mask, _seed(query, dropout_p))
            output = _transforms.call(op, *tensors)
            if output is not None and not return_lse:
                output = output[0]
    if output is None:
        output = _fallback.fallback(
            "attention",
            (query, key, value),
            lambda: _by_torch(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse
            ),
        )
    return output


def _read(cache, is_causal, window):
    """The keys and values of a cache, and the window in which each query sees those up to its own position."""
    from fastnn.nn.kv_cache import KVCache  # which is built on this module

    if not isinstance(cache, KVCache):
        raise TypeError("fastnn.attention: value must be a Tensor where key is not a fastnn.nn.KVCache; got NoneType.")
    if is_causal and (window is None or len(window) == 2):
        window = (-1 if window is None else window[0], 0)
    return cache.keys, cache.values, window


def _served(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, op: str) -> bool:
    plain_mask = attn_mask is None or (attn_mask.layout == torch.strided and not attn_mask.is_nested)
    return plain_mask and _fallback.why_not(query, key, value, op=op) is None


def _seed(query: Tensor, dropout_p: float) -> Tensor | None:
    """The key of the dropout of one call, drawn where the query is; None where nothing is dropped."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device) if dropout_p > 0 else None


def _by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse):
    """Torch's operator, or the plain formula for what torch's has not."""
    if window is None and not softcap and not return_lse:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    seed = _seed(query, dropout_p)
    output, lse = reference.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, seed
    )
    return (output, lse) if return_lse else output


def _lead(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> list[int]:
    """The broadcast leading dimensions; the rules are those of ``check`` in csrc/bindings/attention.cpp."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        torch._check(
            tensor.dim() >= 2,
            lambda name=name, tensor=tensor: (
                f"fastnn.attention: {name} must have at least 2 dimensions; got {list(tensor.shape)}."
            ),
        )
        torch._check(
            tensor.dtype == query.dtype,
            lambda name=name, tensor=tensor: (
                f"fastnn.attention: {name} must have the dtype of query ({query.dtype}); got {tensor.dtype}."
            ),
        )
    torch._check(
        query.shape[-1] == key.shape[-1],
        lambda: f"fastnn.attention: key must have query's last dimension, {query.shape[-1]}; got {list(key.shape)}.",
    )
    torch._check(
        key.shape[-2] == value.shape[-2],
        lambda: (
            f"fastnn.attention: value must have as many positions as key, {key.shape[-2]}; got {list(value.shape)}."
        ),
    )
    leads = [list(tensor.shape[:-2]) for tensor in (query, key, value)]
    if enable_gqa:
        for lead in leads[1:]:
            lead[-1] = leads[0][-1]
    return list(torch.broadcast_shapes(*leads))


def _empty_like_query(like: Tensor, lead: list[int], rows: int, cols: int) -> Tensor:
    if like.dim() == 4 and len(lead) == 2 and like.stride(1) < like.stride(2):
        return like.new_empty([lead[0], rows, lead[1], cols]).transpose(1, 2)
    return like.new_empty([*lead, rows, cols])


@torch.library.register_fake("fastnn::attention")
def _(query, key, value, attn_mask=None, *rest):
    lead = _lead(query, key, value, attn_mask, Options(*rest).enable_gqa)
    output = _empty_like_query(query, lead, query.shape[-2], value.shape[-1])
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty([*lead, query.shape[-2]], dtype=lse_dtype)


@torch.library.register_fake("fastnn::attention_backward")
def _(grad_output, grad_lse, query, key, value, attn_mask, output, lse, *rest):
    output_mask = rest[-1]
    lead = list(output.shape[:-2])

    def grad(like, full):
        # Summed to the shape of a broadcast tensor, a gradient is contiguous.
        if list(like.shape[:-2]) != full:
            return like.new_empty(like.shape)
        return _empty_like_query(like, full, like.shape[-2], like.shape[-1])

    def of_keys(like):
        return grad(like, [*lead[:-1], like.shape[-3]] if like.dim() > 2 and lead else lead)

    mask = attn_mask.new_empty(attn_mask.shape) if output_mask[3] and attn_mask is not None else None
    return (
        grad(query, lead) if output_mask[0] else None,
        of_keys(key) if output_mask[1] else None,
        of_keys(value) if output_mask[2] else None,
        mask if mask is not None and mask.is_floating_point() else None,
    )


def _setup_context(ctx, inputs, output):
    grad_output, grad_lse, query, key, value, attn_mask, _, _, *ctx.options, philox_seed, ctx.output_mask = inputs
    ctx.save_for_backward(grad_output, grad_lse, query, key, value, attn_mask, philox_seed)


def _backward(ctx, *grad_grads):
    grad_output, grad_lse, query, key, value, attn_mask, philox_seed = ctx.saved_tensors
    grad_grad_outputs, grads = reference.vjp_of_vjp(
        lambda query, key, value, attn_mask: reference.attention(
            query, key, value, attn_mask, *ctx.options, philox_seed
        ),
        (query, key, value, attn_mask),
        (grad_output, grad_lse),
        ctx.output_mask,
        grad_grads,
    )
    return (*grad_grad_outputs, *grads, *(None,) * 10)


torch.library.register_autograd("fastnn::attention_backward", _backward, setup_context=_setup_context)

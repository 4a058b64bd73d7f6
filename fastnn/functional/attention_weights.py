"""attention_weights: scaled dot-product attention that also returns the weights of the values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnn import _export, _fallback, reference
from fastnn._library import _C
from fastnn.functional import _transforms
from fastnn.functional._attention import AttentionWeights, Options
from fastnn.functional.attention import _empty_like_query, _lead, _seed, _served


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    average: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Attend as :func:`fastnn.functional.scaled_dot_product_attention` does, and return the weights, too.

    .. math:: P = \mathrm{dropout}(\mathrm{softmax}(\mathrm{cap}(\mathrm{scale} \cdot Q K^T) + M)), \quad O = P\, V

    The output comes from the attention kernel; a second pass over queries and keys writes the weights, each once. Where
    no gradient of the weights arrives, the backward is attention's alone; what one adds is computed by torch's operators.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap: as in
            :func:`fastnn.functional.scaled_dot_product_attention`.
        average: return the mean of the weights over the heads.

    Returns:
        The output ``[*, H, L, Ev]`` and the weights ``[*, H, L, S]`` (``[*, L, S]`` with ``average``), of query's dtype.
        A query that may see no key gives NaN in both, as softmax of -infinities does.

    Raises:
        RuntimeError, IndexError, ValueError: as ``scaled_dot_product_attention``; RuntimeError also for ``average``
            without a dimension of heads.

    Source: ``torch.nn.functional.multi_head_attention_forward``; kernels in ``csrc/cpu/attention_weights.inl`` and
        ``csrc/cuda/attention_weights.cuh``.
    """
    if window is not None:
        window = (window, window) if isinstance(window, int) else tuple(window)
    options = (dropout_p, is_causal, scale, enable_gqa, window, softcap)
    results = None
    if not _export.tracing():
        results = _C.attention_weights(query, key, value, attn_mask, *options, average)
        if results is None and _transforms.active() and _served(query, key, value, attn_mask, "attention_weights"):
            tensors = (query, key, value, attn_mask, _seed(query, dropout_p))
            found = _transforms.call(AttentionWeights(*options, average), *tensors)
            results = None if found is None else (found[0], found[2])
    elif _served(query, key, value, attn_mask, "attention_weights"):
        seed = _seed(query, dropout_p)
        output, _, weights = _export.ops().attention_weights(query, key, value, attn_mask, *options, seed, average)
        results = output, weights
    if results is None:
        results = _fallback.fallback(
            "attention_weights",
            (query, key, value),
            lambda: _by_torch(query, key, value, attn_mask, options, average),
        )
    return results


def _by_torch(query, key, value, attn_mask, options, average):
    seed = _seed(query, options[0])
    output, _, weights = reference.attention_weights(query, key, value, attn_mask, *options, seed, average)
    return output, weights


@torch.library.register_fake("fastnn::attention_weights")
def _(query, key, value, attn_mask=None, *rest):
    options = Options(*rest)
    lead, average = _lead(query, key, value, attn_mask, options.enable_gqa), options.average
    torch._check(
        not average or len(lead) > 0,
        lambda: f"fastnn.attention_weights: query must have a dimension of heads to average; got {list(query.shape)}.",
    )
    output = _empty_like_query(query, lead, query.shape[-2], value.shape[-1])
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty([*lead, query.shape[-2]], dtype=lse_dtype)
    return output, lse, query.new_empty([*(lead[:-1] if average else lead), query.shape[-2], key.shape[-2]])


def _backward(grad_weights, query, key, value, attn_mask, *rest):
    *options, wanted = rest
    return reference.vjp(
        lambda query, key, attn_mask: reference.attention_weights(query, key, value, attn_mask, *options)[2],
        (query, key, attn_mask),
        grad_weights,
        wanted,
    )


_library = torch.library.Library("fastnn", "IMPL")
_library.impl("attention_weights_backward", _backward, "CompositeImplicitAutograd")

"""multi_head_attention_forward: the projections, attention and the output projection of torch.nn.MultiheadAttention."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._fallback import fallback
from fastnn.functional.attention import scaled_dot_product_attention
from fastnn.functional.attention_weights import attention_weights
from fastnn.functional.linear import linear


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool = False,
    packed: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    r"""Attend with several heads, between a projection of queries, keys and values and one of the output.

    .. math:: \text{MultiHead}(Q, K, V) = \text{Concat}(\text{head}_1, …, \text{head}_h) W^O, \quad
        \text{head}_i = \text{softmax}(Q W_i^Q (K W_i^K)^T / \sqrt{d} + M) V W_i^V

    Args:
        query: ``[L, N, E]``, or ``[N, L, E]`` with ``batch_first``; unbatched ``[L, E]``.
        key: ``[S, N, kdim]``, ``[N, S, kdim]`` or ``[S, kdim]``.
        value: ``[S, N, vdim]``, ``[N, S, vdim]`` or ``[S, vdim]``.
        embed_dim_to_check: E.
        num_heads: heads of ``E / num_heads`` features each.
        in_proj_weight: ``[3 E, E]``, or None with ``use_separate_proj_weight``.
        in_proj_bias: ``[3 E]`` or None.
        bias_k, bias_v: ``[1, 1, E]``, one more key and value, or None.
        add_zero_attn: add a key and a value of zeros.
        dropout_p: probability of dropping a weight in training.
        out_proj_weight, out_proj_bias: ``[E, E]`` and ``[E]`` or None.
        training: whether to drop.
        key_padding_mask: ``[N, S]`` or ``[S]``; bool (True: ignore the key) or floating (added to the scores).
        need_weights: also return the weights, which a second kernel writes.
        attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``; bool (True: not allowed) or floating (added).
        use_separate_proj_weight: project by the three weights that follow.
        q_proj_weight, k_proj_weight, v_proj_weight: ``[E, E]``, ``[E, kdim]`` and ``[E, vdim]``.
        static_k, static_v: keys and values already projected, ``[N * num_heads, S, E / num_heads]``: torch computes these.
        average_attn_weights: return the mean of the weights over the heads.
        is_causal: a hint that ``attn_mask`` is the causal mask.
        batch_first: whether N stands first.
        packed: what ``torch.ops.fastnn.linear_pack`` made of ``in_proj_weight`` and of ``out_proj_weight``, for inference
            with frozen weights.

    Returns:
        The output, of the query's shape, and the weights ``[N, L, S]`` (``[N, num_heads, L, S]`` for each head) or None.

    Raises:
        AssertionError, RuntimeError: where ``torch.nn.functional.multi_head_attention_forward`` raises them.

    Source: ``torch.nn.functional.multi_head_attention_forward``; Vaswani et al., Attention Is All You Need,
    https://arxiv.org/abs/1706.03762
    """
    if static_k is not None or static_v is not None:
        if batch_first:
            raise RuntimeError(_text("batch_first", "be False with static_k or static_v", batch_first))
        args = (query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v)
        args += (add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights)
        args += (attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v)
        return fallback(
            "multi_head_attention",
            (query, key, value),
            lambda: F.multi_head_attention_forward(*args, average_attn_weights, is_causal),
            "static keys and values have no kernel",
        )
    is_batched = query.dim() == 3
    batch_first = batch_first or not is_batched
    _check(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight, batch_first)
    _check_masks(query, key, num_heads, key_padding_mask, attn_mask, is_causal, batch_first)
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    elif in_proj_weight is None:
        raise AssertionError(_text("in_proj_weight", "be given without use_separate_proj_weight", None))
    else:
        weights = (in_proj_weight,)
    projected = _in_projection(query, key, value, weights, in_proj_bias, packed[0])
    heads = (x if is_batched else x.unsqueeze(0) for x in projected)
    heads = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)) for x in heads)
    q, k, v = (x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3) for x in heads)

    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # the hint stands for the mask
    else:
        is_causal = False
    mask = _merge_masks(attn_mask, key_padding_mask, q)
    k, v, mask = _extend(k, v, mask, bias_k, bias_v, add_zero_attn)
    dropout_p = dropout_p if training else 0.0

    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()
    weights = None
    if need_weights:
        output, weights = attention_weights(q, k, v, mask, dropout_p, average=average_attn_weights)
    else:
        output = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)

    output = output.transpose(1, 2) if batch_first else output.permute(2, 0, 1, 3)
    output = linear(output.flatten(-2), out_proj_weight, out_proj_bias, packed=packed[1])
    if not is_batched:
        output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output, weights


def _in_projection(query, key, value, weights, bias, packed):
    """Project to queries, keys and values, in as few products as there are different inputs."""
    if len(weights) == 3:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    (weight,) = weights
    if query is key and key is value:
        return linear(query, weight, bias, packed=packed).chunk(3, -1)
    if key is value:
        sizes = (weight.shape[0] // 3, weight.shape[0] // 3 * 2)
        w_q, w_kv = weight.split(sizes)
        b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
        return linear(query, w_q, b_q), *linear(key, w_kv, b_kv).chunk(2, -1)
    return _in_projection(query, key, value, weight.chunk(3), bias, None)


def _extend(k, v, mask, bias_k, bias_v, add_zero_attn) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the learned key and value and the zeros, which no mask hides."""
    if (bias_k is None) != (bias_v is None):
        raise AssertionError(_text("bias_k", "come with bias_v", "one of them"))
    batch, heads, before, head_dim = k.shape
    shape, added = (batch, heads, 1, head_dim), 0
    if bias_k is not None:
        k = torch.cat([k, bias_k.view(1, heads, 1, head_dim).expand(shape)], 2)
        v = torch.cat([v, bias_v.view(1, heads, 1, head_dim).expand(shape)], 2)
        added += 1
    if add_zero_attn:
        k, v = torch.cat([k, k.new_zeros(shape)], 2), torch.cat([v, v.new_zeros(shape)], 2)
        added += 1
    if mask is not None and added:
        mask = F.pad(mask, (0, added))
    return k, v, mask


def _check(query, key, value, embed_dim, num_heads, separate, batch_first) -> None:
    """Raise what torch raises for the same mistake in the tensors that are projected."""
    dim = query.dim()
    if dim not in (2, 3):
        raise AssertionError(_text("query", "be 2-D (unbatched) or 3-D", f"{dim}-D"))
    for name, x in (("key", key), ("value", value)):
        if x.dim() != dim:
            raise AssertionError(_text(name, f"be {dim}-D like query", f"{x.dim()}-D"))
    if query.shape[-1] != embed_dim:
        raise AssertionError(_text("query", f"have {embed_dim} features", query.shape[-1]))
    if embed_dim % num_heads:
        raise AssertionError(_text("num_heads", f"divide the {embed_dim} features", num_heads))
    if (key.shape[:-1] != value.shape[:-1]) if separate else (key.shape != value.shape):
        raise AssertionError(_text("value", f"fit key's shape {tuple(key.shape)}", tuple(value.shape)))
    batch_dim = 0 if batch_first else 1
    if dim == 3 and key.shape[batch_dim] != query.shape[batch_dim]:
        batch = query.shape[batch_dim]
        raise RuntimeError(_text("key", f"have query's batch size {batch}", key.shape[batch_dim]))


def _check_masks(query, key, num_heads, key_padding_mask, attn_mask, is_causal, batch_first) -> None:
    """Raise what torch raises for the same mistake in the masks."""
    dim = query.dim()
    batch = query.shape[0 if batch_first else 1] if dim == 3 else 1
    length, source = (x.shape[-2] if batch_first else x.shape[0] for x in (query, key))
    if is_causal and attn_mask is None:
        raise RuntimeError(_text("attn_mask", "be given along with the hint is_causal", None))
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(_text(name, "be of type bool or floating", mask.dtype))
    if key_padding_mask is not None:
        expected = (batch, source) if dim == 3 else (source,)
        if key_padding_mask.shape != expected:
            raise AssertionError(_text("key_padding_mask", f"have shape {expected}", tuple(key_padding_mask.shape)))
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(_text("attn_mask", "be 2-D or 3-D", f"{attn_mask.dim()}-D"))
        expected = (length, source) if attn_mask.dim() == 2 else (batch * num_heads, length, source)
        if attn_mask.shape != expected:
            error = AssertionError if dim == 2 and attn_mask.dim() == 3 else RuntimeError
            raise error(_text("attn_mask", f"have shape {expected}", tuple(attn_mask.shape)))
        if key_padding_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            text = (
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead."
            )
            warnings.warn(text, stacklevel=4)


def _text(argument: str, rule: str, got: object) -> str:
    return f"fastnn.MultiheadAttention: {argument} must {rule}; got {got}."


def _merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Merge both masks into one that broadcasts to ``[N, num_heads, L, S]``: bool (True: masked) or additive."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(q.shape[0], 1, 1, key_padding_mask.shape[-1])
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
        return mask[None, None] if mask is not None and mask.dim() == 2 else mask
    if attn_mask.dtype == torch.bool and key_padding_mask.dtype == torch.bool:
        return attn_mask | key_padding_mask
    return _additive(attn_mask, q.dtype) + _additive(key_padding_mask, q.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)

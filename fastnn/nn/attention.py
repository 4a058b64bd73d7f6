"""Multi-head attention that takes the place of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn import functional
from fastnn._fallback import fallback
from fastnn.nn._frozen import Frozen
from fastnn.nn.linear import Linear


class NonDynamicallyQuantizableLinear(Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection: a :class:`fastnn.nn.Linear` under the name that torch gives it."""


class MultiheadAttention(Frozen, nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` computed by fastnn's linear and attention kernels.

    .. math:: \text{MultiHead}(Q, K, V) = \text{Concat}(\text{head}_1, …, \text{head}_h) W^O, \quad
        \text{head}_i = \text{softmax}(Q W_i^Q (K W_i^K)^T / \sqrt{d} + M) V W_i^V

    Self-attention (``query is key is value``) projects queries, keys and values in one call. With
    ``need_weights=True`` (torch's default) a second kernel writes the weights, or their mean over the heads: leave it off
    where nobody looks at them.

    The answers are those of ``torch.nn.MultiheadAttention`` outside of its inference fast path: in training and
    evaluation alike, floating masks are added to the scores (the fast path takes them for bool masks), a query
    whose keys are all masked gets zeros (NaN with ``need_weights=True``), and ``is_causal`` needs ``attn_mask``.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype:
            as in ``torch.nn.MultiheadAttention``; so are the parameters and the ``state_dict``.

    Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        options = (dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first)
        super().__init__(embed_dim, num_heads, *options, device, dtype)
        self.out_proj.__class__ = NonDynamicallyQuantizableLinear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; unbatched ``[L, E]``.
            key: ``[N, S, kdim]``, ``[S, N, kdim]`` or ``[S, kdim]``.
            value: ``[N, S, vdim]``, ``[S, N, vdim]`` or ``[S, vdim]``.
            key_padding_mask: ``[N, S]`` or ``[S]``; bool (True: ignore the key) or floating (added to the scores).
            need_weights: also return the weights.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``; bool (True: not allowed) or floating (added).
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, of the query's shape, and the weights ``[N, L, S]`` (``[N, num_heads, L, S]`` for each head)
            or None.

        Raises:
            AssertionError, RuntimeError: where ``torch.nn.MultiheadAttention`` raises them.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            stock = nn.MultiheadAttention.forward
            return fallback("multi_head_attention", (query, key, value), lambda: stock(self, *args))

        is_batched = query.dim() == 3
        batch_first = self.batch_first or not is_batched
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        q, k, v = self._in_projection(query, key, value, is_batched, batch_first)

        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None  # the hint stands for the mask
        else:
            is_causal = False
        mask = _merge_masks(attn_mask, key_padding_mask, q)
        k, v, mask = self._extend(k, v, mask)
        dropout_p = self.dropout if self.training else 0.0

        if mask is not None and mask.dtype == torch.bool:
            mask = mask.logical_not()
        weights = None
        if need_weights:
            output, weights = functional.attention_weights(q, k, v, mask, dropout_p, average=average_attn_weights)
        else:
            output = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)

        output = output.transpose(1, 2) if batch_first else output.permute(2, 0, 1, 3)
        output = linear(self.out_proj, output.flatten(-2))
        if not is_batched:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _in_projection(
        self, query: Tensor, key: Tensor, value: Tensor, is_batched: bool, batch_first: bool
    ) -> tuple[Tensor, ...]:
        """Project to queries, keys and values, each a ``[N, num_heads, length, head_dim]`` view."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        sizes = (self.embed_dim, 2 * self.embed_dim)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = [
                functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=False)
            ]
        elif query is key and key is value:
            packed = self._packed(weight, torch.ops.fastnn.linear_pack) if self._frozen else None
            projected = functional.linear(query, weight, bias, packed=packed).chunk(3, -1)
        elif key is value:
            w_q, w_kv = weight.split(sizes)
            b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
            projected = (functional.linear(query, w_q, b_q), *functional.linear(key, w_kv, b_kv).chunk(2, -1))
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = [
                functional.linear(x, w, b)
                for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=False)
            ]
        heads = (x if is_batched else x.unsqueeze(0) for x in projected)
        heads = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in heads)
        return tuple(x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3) for x in heads)

    def _extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append ``add_bias_kv``'s learned key and value and ``add_zero_attn``'s zeros, which no mask hides."""
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        before = k.shape[2]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.view(1, self.num_heads, 1, self.head_dim).expand(shape)], 2)
            v = torch.cat([v, self.bias_v.view(1, self.num_heads, 1, self.head_dim).expand(shape)], 2)
        if self.add_zero_attn:
            k, v = torch.cat([k, k.new_zeros(shape)], 2), torch.cat([v, v.new_zeros(shape)], 2)
        if mask is not None and k.shape[2] != before:
            mask = F.pad(mask, (0, k.shape[2] - before))
        return k, v, mask

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raise what torch raises for the same mistake."""
        dim = query.dim()
        if dim not in (2, 3):
            raise AssertionError(_text("query", "be 2-D (unbatched) or 3-D", f"{dim}-D"))
        for name, x in (("key", key), ("value", value)):
            if x.dim() != dim:
                raise AssertionError(_text(name, f"be {dim}-D like query", f"{x.dim()}-D"))
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(_text("query", f"have {self.embed_dim} features", query.shape[-1]))
        same = self._qkv_same_embed_dim
        if (key.shape != value.shape) if same else (key.shape[:-1] != value.shape[:-1]):
            raise AssertionError(_text("value", f"fit key's shape {tuple(key.shape)}", tuple(value.shape)))
        batch_dim = 0 if self.batch_first else 1
        batch = query.shape[batch_dim] if dim == 3 else 1
        if dim == 3 and key.shape[batch_dim] != batch:
            raise RuntimeError(_text("key", f"have query's batch size {batch}", key.shape[batch_dim]))
        length, source = (x.shape[-2] if self.batch_first or dim == 2 else x.shape[0] for x in (query, key))
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
            expected = (length, source) if attn_mask.dim() == 2 else (batch * self.num_heads, length, source)
            if attn_mask.shape != expected:
                error = AssertionError if dim == 2 and attn_mask.dim() == 3 else RuntimeError
                raise error(_text("attn_mask", f"have shape {expected}", tuple(attn_mask.shape)))
            if key_padding_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
                text = "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead."
                warnings.warn(text, stacklevel=3)


def linear(module: nn.Linear, input: Tensor, activation: str | None = None) -> Tensor:
    """Apply ``module``'s weight and bias without calling it (no hooks), and fused with them an activation."""
    packed = module._packed(module.weight, torch.ops.fastnn.linear_pack) if getattr(module, "_frozen", False) else None
    return functional.linear(input, module.weight, module.bias, activation=activation, packed=packed)


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

"""Multi-head attention that takes the place of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import torch
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

        packed, separate = (None, None), not self._qkv_same_embed_dim
        if self._frozen:
            alike = query is key and key is value and not separate
            packed = (
                self._packed(self.in_proj_weight, torch.ops.fastnn.linear_pack) if alike else None,
                _pack(self.out_proj),
            )
        return functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            separate,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
            packed=packed,
        )


def _pack(module: nn.Linear) -> Tensor | None:
    frozen = getattr(module, "_frozen", False)
    return module._packed(module.weight, torch.ops.fastnn.linear_pack) if frozen else None


def linear(module: nn.Linear, input: Tensor, activation: str | None = None) -> Tensor:
    """Apply ``module``'s weight and bias without calling it (no hooks), and fused with them an activation."""
    return functional.linear(input, module.weight, module.bias, activation=activation, packed=_pack(module))

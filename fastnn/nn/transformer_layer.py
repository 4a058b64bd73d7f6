"""Transformer layers that take the place of those of ``torch.nn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._fallback import fallback
from fastnn.nn.attention import MultiheadAttention, linear
from fastnn.nn.linear import Linear

_FUSED = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


class _TransformerLayer(nn.Module):
    """What the encoder and the decoder layer share: how they are made, and the feed-forward block."""

    _attentions: tuple[str, ...]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the children in torch's order, so that one seed gives the same parameters as there."""
        nn.Module.__init__(self)
        where = {"device": device, "dtype": dtype}
        for name in self._attentions:
            attention = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first, **where)
            self.add_module(name, attention)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, **where)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **where)
        self.norm_first = norm_first
        blocks = range(1, len(self._attentions) + 2)
        for i in blocks:
            self.add_module(f"norm{i}", nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where))
        for i in blocks:
            self.add_module(f"dropout{i}", nn.Dropout(dropout))
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise RuntimeError(f"fastnn.Transformer: activation must be 'relu' or 'gelu'; got {activation!r}.")
            activation = getattr(F, activation)
        self.activation = activation
        if isinstance(self, nn.TransformerEncoderLayer):  # torch's stack asks which one its fast path would fuse
            is_relu = activation is F.relu or isinstance(activation, nn.ReLU)
            is_gelu = activation is F.gelu or isinstance(activation, nn.GELU)
            self.activation_relu_or_gelu = 1 if is_relu else 2 * is_gelu

    def _ff(self, x: Tensor) -> Tensor:
        """Return ``linear2(dropout(activation(linear1(x))))``, the activation fused into ``linear1`` where it can be."""
        name = _fused_name(self.activation)
        if name is not None and _is_plain(self.linear1):
            hidden = linear(self.linear1, x, name)
        else:
            hidden = self.activation(self.linear1(x))
        return self.linear2(self.dropout(hidden))


def _fused_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name under which the linear kernel fuses ``activation``, or None."""
    if not isinstance(activation, nn.Module):
        return _FUSED.get(activation)
    if _has_hooks(activation):
        return None
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(activation))


def _is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` would do nothing but multiply by its weight and add its bias."""
    if type(module) not in (nn.Linear, Linear) or "forward" in module.__dict__ or _has_hooks(module):
        return False
    return getattr(module, "activation", None) is None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class TransformerEncoderLayer(_TransformerLayer, nn.TransformerEncoderLayer):
    r"""``torch.nn.TransformerEncoderLayer`` on fastnn's kernels, in training and in evaluation.

    .. math:: y = \text{norm}_1(x + \text{attention}(x)), \quad z = \text{norm}_2(y + W_2\, a(W_1 y))

    (with ``norm_first`` the norms stand before each block). ReLU, GELU and SiLU are fused into ``linear1``.
    There is one path: evaluation gives what torch gives outside of its inference fast path.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
        dtype: as in ``torch.nn.TransformerEncoderLayer``; so are the children and the ``state_dict``.

    Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """

    _attentions = ("self_attn",)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass ``src`` through the layer.

        Args:
            src: ``[N, S, E]`` with ``batch_first``, else ``[S, N, E]``; unbatched ``[S, E]``.
            src_mask: ``[S, S]`` or ``[N * nhead, S, S]``; bool (True: not allowed) or floating (added).
            src_key_padding_mask: ``[N, S]`` or ``[S]``.
            is_causal: a hint that ``src_mask`` is the causal mask.

        Returns:
            A tensor of ``src``'s shape.
        """
        if src.is_nested:
            stock, args = nn.TransformerEncoderLayer.forward, (src, src_mask, src_key_padding_mask, is_causal)
            return fallback("transformer_encoder_layer", (src,), lambda: stock(self, *args))
        if not isinstance(self.self_attn, MultiheadAttention):  # others get the masks that torch gives them
            src_mask, src_key_padding_mask = floating_masks(src, src_mask, src_key_padding_mask)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._ff(x))


class TransformerDecoderLayer(_TransformerLayer, nn.TransformerDecoderLayer):
    r"""``torch.nn.TransformerDecoderLayer`` on fastnn's kernels.

    .. math:: y = \text{norm}_1(x + \text{attention}(x)), \quad u = \text{norm}_2(y + \text{attention}(y, m)), \quad
        z = \text{norm}_3(u + W_2\, a(W_1 u))

    (with ``norm_first`` the norms stand before each block). ReLU, GELU and SiLU are fused into ``linear1``.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
        dtype: as in ``torch.nn.TransformerDecoderLayer``; so are the children, ``forward`` and the ``state_dict``.

    Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """

    _attentions = ("self_attn", "multihead_attn")

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self._ff(x))


def floating_masks(src: Tensor, mask: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Make both masks additive: what a layer that is not fastnn's expects of torch."""
    other = F._none_or_dtype(mask)
    padding = F._canonical_mask(padding, "src_key_padding_mask", other, "mask", src.dtype)
    return F._canonical_mask(mask, "mask", None, "", src.dtype, check_other=False), padding

"""Transformer layers and stacks that take the place of those of ``torch.nn``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._fallback import fallback
from fastnn.nn.attention import MultiheadAttention, linear
from fastnn.nn.linear import Linear

_FUSED = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


class _FeedForward(nn.Module):
    """What the encoder and the decoder layer share: how they are built, and the feed-forward block."""

    def _build(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: str | Callable[[Tensor], Tensor],
        layer_norm_eps: float,
        batch_first: bool,
        norm_first: bool,
        bias: bool,
        attentions: tuple[str, ...],
        **factory_kwargs: Any,
    ) -> None:
        """Make the children in torch's order, so that one seed gives the same parameters as there."""
        nn.Module.__init__(self)
        for name in attentions:
            attention = MultiheadAttention(
                d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first, **factory_kwargs
            )
            self.add_module(name, attention)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, **factory_kwargs)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **factory_kwargs)
        self.norm_first = norm_first
        blocks = range(1, len(attentions) + 2)
        for i in blocks:
            self.add_module(f"norm{i}", nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory_kwargs))
        for i in blocks:
            self.add_module(f"dropout{i}", nn.Dropout(dropout))
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise RuntimeError(f"fastnn.Transformer: activation must be 'relu' or 'gelu'; got {activation!r}.")
            activation = getattr(F, activation)
        self.activation = activation

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


class TransformerEncoderLayer(_FeedForward, nn.TransformerEncoderLayer):
    r"""``torch.nn.TransformerEncoderLayer`` on fastnn's kernels, in training and in evaluation.

    .. math:: y = \text{norm}_1(x + \text{attention}(x)), \quad z = \text{norm}_2(y + W_2\, a(W_1 y))

    (with ``norm_first`` the norms stand before each block). ReLU, GELU and SiLU are fused into ``linear1``.
    There is one path: evaluation gives what torch gives outside of its inference fast path.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
        dtype: as in ``torch.nn.TransformerEncoderLayer``; so are the children and the ``state_dict``.

    Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """

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
        options = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        self._build(d_model, nhead, *options, ("self_attn",), device=device, dtype=dtype)
        if self.activation is F.relu or isinstance(self.activation, nn.ReLU):
            self.activation_relu_or_gelu = 1
        else:
            self.activation_relu_or_gelu = 2 * (self.activation is F.gelu or isinstance(self.activation, nn.GELU))

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
            src_mask, src_key_padding_mask = _floating_masks(src, src_mask, src_key_padding_mask)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._ff(x))


class TransformerDecoderLayer(_FeedForward, nn.TransformerDecoderLayer):
    r"""``torch.nn.TransformerDecoderLayer`` on fastnn's kernels.

    .. math:: y = \text{norm}_1(x + \text{attention}(x)), \quad u = \text{norm}_2(y + \text{attention}(y, m)), \quad
        z = \text{norm}_3(u + W_2\, a(W_1 u))

    (with ``norm_first`` the norms stand before each block). ReLU, GELU and SiLU are fused into ``linear1``.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
        dtype: as in ``torch.nn.TransformerDecoderLayer``; so are the children, ``forward`` and the ``state_dict``.

    Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """

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
        options = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        self._build(d_model, nhead, *options, ("self_attn", "multihead_attn"), device=device, dtype=dtype)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self._ff(x))


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: a stack of copies of one encoder layer.

    No nested tensor is made of a padded batch. Where torch would make one (evaluation without gradients,
    ``enable_nested_tensor``, a left-aligned ``src_key_padding_mask`` and no other mask) the outputs at padded
    positions are zeros (before ``norm``), as torch's are.

    Args:
        encoder_layer, num_layers, norm, enable_nested_tensor, mask_check: as in ``torch.nn.TransformerEncoder``.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass ``src`` through the layers in turn; arguments as in :class:`TransformerEncoderLayer`.

        Args:
            is_causal: a hint that ``mask`` is the causal mask; None looks whether it is (not under torch.compile).
        """
        if not all(type(layer) is TransformerEncoderLayer for layer in self.layers):
            mask, src_key_padding_mask = _floating_masks(src, mask, src_key_padding_mask)
        padding = self._zeroed_padding(src, mask, src_key_padding_mask)
        if padding is not None:
            src_key_padding_mask = padding
        is_causal = _is_causal(mask, is_causal, src, self.layers[0].self_attn.batch_first)

        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        if padding is not None:
            output = output.masked_fill(padding.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _zeroed_padding(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return the padded positions (bool) where torch would run on a nested tensor, else None."""
        layer = self.layers[0]
        if padding is None or mask is not None or src.is_nested or src.dim() != 3 or layer.training:
            return None
        if not (getattr(self, "use_nested_tensor", False) and torch.backends.mha.get_fastpath_enabled()):
            return None
        if torch.is_autocast_enabled() or torch.overrides.has_torch_function((src,)):
            return None
        if src.device.type not in ("cpu", "cuda", "xpu"):
            return None
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in layer.parameters())):
            return None
        keep = padding.logical_not()
        if getattr(self, "mask_check", True) and (
            torch.compiler.is_compiling() or not torch._nested_tensor_from_mask_left_aligned(src, keep)
        ):
            return None
        return keep.logical_not()


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``: a stack of copies of one decoder layer.

    Args:
        decoder_layer, num_layers, norm: as in ``torch.nn.TransformerDecoder``.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass ``tgt`` and the encoder's ``memory`` through the layers in turn.

        Args:
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask; None looks whether it is (not under
                torch.compile).
        """
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal, tgt, self.layers[0].self_attn.batch_first)
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` made of fastnn's encoder and decoder.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, custom_encoder,
        custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as in ``torch.nn.Transformer``;
            so are ``forward``, the children and the ``state_dict``.

    Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        where = {"device": device, "dtype": dtype}
        options = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        if custom_encoder is None:
            layer = TransformerEncoderLayer(*options, **where)
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
            custom_encoder = TransformerEncoder(layer, num_encoder_layers, norm)
        self.encoder = custom_encoder
        if custom_decoder is None:
            layer = TransformerDecoderLayer(*options, **where)
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
            custom_decoder = TransformerDecoder(layer, num_decoder_layers, norm)
        self.decoder = custom_decoder
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first


def _floating_masks(src: Tensor, mask: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Make both masks additive: what a layer that is not fastnn's expects of torch."""
    other = F._none_or_dtype(mask)
    padding = F._canonical_mask(padding, "src_key_padding_mask", other, "mask", src.dtype)
    return F._canonical_mask(mask, "mask", None, "", src.dtype, check_other=False), padding


def _is_causal(mask: Tensor | None, hint: bool | None, x: Tensor, batch_first: bool) -> bool:
    """Return the hint; without one, whether ``mask`` hides exactly what comes later."""
    if hint is not None or mask is None or x.is_nested or mask.is_meta or torch.compiler.is_compiling():
        return hint is True
    size = x.shape[0] if x.dim() == 2 else x.shape[1 if batch_first else 0]
    if mask.shape != (size, size):
        return False
    masked = True if mask.dtype == torch.bool else -math.inf
    causal = torch.full((size, size), masked, dtype=mask.dtype, device=mask.device).triu_(1)
    return torch.equal(mask, causal)

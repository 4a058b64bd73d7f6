"""Stacks of Transformer layers, and the Transformer, that take the place of those of ``torch.nn``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer, floating_masks


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
            mask, src_key_padding_mask = floating_masks(src, mask, src_key_padding_mask)
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
        if src.device.type not in ("cpu", "cuda", "xpu"):
            return None
        if torch.is_autocast_enabled(src.device.type) or torch.overrides.has_torch_function((src,)):
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

"""fastnn::attention and fastnn::attention_weights under torch.func's transforms and in forward-mode AD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastnn import reference
from fastnn.functional import _batching, _transforms
from fastnn.functional._transforms import below_autograd


class Options(NamedTuple):
    """What follows attn_mask in the ops, for functions that torch calls: it leaves out what ends in defaults."""

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    window: Sequence[int] | None = None
    softcap: float | None = None
    philox_seed: Tensor | None = None
    average: bool = False  # of attention_weights


@dataclass(frozen=True)
class Attention(_transforms.Op):
    """The op for torch.func's transforms; its tensors are query, key, value, attn_mask, philox_seed."""

    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    window: Sequence[int] | None
    softcap: float | None

    results = 2

    def _options(self):
        return self.dropout_p, self.is_causal, self.scale, self.enable_gqa, self.window, self.softcap

    def forward(self, query, key, value, attn_mask, philox_seed):
        return torch.ops.fastnn.attention(query, key, value, attn_mask, *self._options(), philox_seed)

    def backward(self, wanted, grads, tensors, outputs):
        *inputs, philox_seed = tensors
        grad_output = torch.zeros_like(outputs[0]) if grads[0] is None else grads[0]
        with below_autograd():
            return *torch.ops.fastnn.attention_backward(
                grad_output, grads[1], *inputs, *outputs[:2], *self._options(), philox_seed, wanted[:4]
            ), None

    def formula(self, query, key, value, attn_mask, philox_seed):
        return reference.attention(query, key, value, attn_mask, *self._options(), philox_seed)

    batch = staticmethod(_batching.attention)
    batch_backward = staticmethod(_batching.attention_backward)


@torch.library.register_vmap("fastnn::attention")
def _(info, in_dims, query, key, value, attn_mask=None, *rest):
    options = Options(*rest)
    op = Attention(*options[:6])
    dims, tensors = _dims(in_dims), (query, key, value, attn_mask, options.philox_seed)
    return _batching.attention(_transforms.run_forward, info.batch_size, dims, op, *tensors)


@torch.library.register_vmap("fastnn::attention_backward")
def _(info, in_dims, grad_output, grad_lse, query, key, value, attn_mask, output, lse, *rest):
    *options, philox_seed, output_mask = rest
    pull = _transforms.Pull(Attention(*options), (*output_mask, False), 2)
    dims = (*in_dims[:6], in_dims[-2], *in_dims[6:8])
    tensors = (grad_output, grad_lse, query, key, value, attn_mask, philox_seed, output, lse)
    found, where = _transforms.batched_backward(info, dims, pull, *tensors)
    return found[:4], where[:4]


@dataclass(frozen=True)
class AttentionWeights(Attention):
    """The op for torch.func's transforms."""

    average: bool

    results = 3

    def forward(self, query, key, value, attn_mask, philox_seed):
        options = (*self._options(), philox_seed, self.average)
        return torch.ops.fastnn.attention_weights(query, key, value, attn_mask, *options)

    def backward(self, wanted, grads, tensors, outputs):
        found = [None] * 5
        if grads[0] is not None or grads[1] is not None:
            found = list(super().backward(wanted, grads, tensors, outputs))
        if grads[2] is not None:
            options, own = (*self._options(), tensors[4], self.average), (0, 1, 3)
            mask = [wanted[i] for i in own]
            more = torch.ops.fastnn.attention_weights_backward(grads[2], *tensors[:4], *options, mask)
            for i, grad in zip(own, more, strict=True):
                found[i] = grad if found[i] is None else found[i] if grad is None else found[i] + grad
        return tuple(
            torch.zeros_like(t) if w and g is None else g for g, t, w in zip(found, tensors, wanted, strict=True)
        )

    def formula(self, query, key, value, attn_mask, philox_seed):
        return reference.attention_weights(query, key, value, attn_mask, *self._options(), philox_seed, self.average)


@torch.library.register_vmap("fastnn::attention_weights")
def _(info, in_dims, query, key, value, attn_mask=None, *rest):
    options = Options(*rest)
    op = AttentionWeights(*options[:6], options.average)
    dims, tensors = _dims(in_dims), (query, key, value, attn_mask, options.philox_seed)
    return _batching.attention(_transforms.run_forward, info.batch_size, dims, op, *tensors)


def _dims(in_dims):
    """Of query, key, value, attn_mask and philox_seed; arguments at the end may have been left out."""
    in_dims = (*in_dims, *(None,) * 11)
    return *in_dims[:4], in_dims[10]


_transforms.register_old_vmap("attention_backward")

"""Hugging Face models: their attention interface and ``Conv1D``; ``transformers`` is optional, never imported from here first."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastnn import _export, functional
from fastnn._library import _C
from fastnn.nn._frozen import Frozen, parameters

NAME = "fastnn"


class Conv1D(Frozen, nn.Module):
    r"""y = f(x W + b), in one kernel: what GPT-2 has for linear layers, with a weight ``[in_features, out_features]``."""

    weight: Tensor
    bias: Tensor
    activation: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        (weight, bias), packed = parameters(self, ("weight", "bias")), None
        if self._frozen and not _export.tracing() and _C._linear_packs(input, weight.t()):
            packed = self._packed(weight, lambda w: torch.ops.fastnn.linear_pack(w.t()))
        return functional.linear(input, weight.t(), bias, activation=self.activation, packed=packed)


def is_conv1d(cls: type) -> bool:
    """Say whether a class is ``transformers.pytorch_utils.Conv1D`` itself."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    r"""Attend, by the contract of ``transformers.AttentionInterface`` and the masks of its ``"sdpa"``.

    .. math:: O = \text{softmax}(\text{scaling} \cdot Q K^T + B) V

    Keys and values of grouped queries are not repeated; a soft cap is served, which ``"sdpa"`` refuses.

    Args:
        module: the attention module that calls; its ``is_causal`` counts where the argument is None.
        query: ``[N, H, L, D]``.
        key: ``[N, H_kv, S, D]``.
        value: ``[N, H_kv, S, D_v]``.
        attention_mask: bool (True: attend) or additive, broadcasting to ``[N, H, L, S]``; None for none or causal.
        dropout: probability; the caller passes 0 in evaluation.
        scaling: None for ``1 / sqrt(D)``.
        is_causal: attend to earlier keys only, when there is no mask and more than one query.
        softcap: ``softcap * tanh(scores / softcap)``.
        position_bias: additive, broadcasting to ``[N, H, L, S]``.

    Returns:
        The output ``[N, L, H, D_v]``, and None for the weights.

    Raises:
        ValueError: for attention sinks, which no kernel serves.
    """
    for sinks in ("s_aux", "sinks"):
        if kwargs.get(sinks) is not None:
            raise ValueError(f"fastnn.huggingface: {sinks} must be None; got attention sinks. Use 'eager'.")
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        key, value = kwargs["cache"].update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    if position_bias is not None:
        attention_mask = _biased_mask(position_bias, attention_mask, is_causal, query, key)
        is_causal = False
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap,
    )
    return output.transpose(1, 2).contiguous(), None


def _biased_mask(bias: Tensor, mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """Add the mask to ``bias``. Hidden keys get the lowest finite number, as in ``"sdpa"``."""
    if mask is None:
        if not is_causal:
            return bias
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(key.dtype).min)
    return bias + mask


def why_not(model: nn.Module) -> str | None:
    """Say why :func:`switch` would leave this Hugging Face model (without its submodels) as it is, or None.

    Args:
        model: any module.

    Returns:
        The reason in words, or None when the model can be switched.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return "not a Hugging Face model"
    if not (hasattr(transformers, "AttentionInterface") and hasattr(model, "_can_set_attn_implementation")):
        return f"transformers {transformers.__version__} has no attention interface"
    implementation = getattr(model.config, "_attn_implementation", None)
    if not getattr(model, "_supports_sdpa", True):
        return "its class offers no 'sdpa' attention, or has none at all"
    if implementation != "sdpa":
        return f"its attention is {implementation!r}, which was chosen for its own sake; only 'sdpa' is switched"
    if not model._can_set_attn_implementation():
        return "the model does not use the attention interface"
    source = sys.modules[type(model).__module__]
    for name in ("ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS"):
        if "sdpa" in getattr(getattr(source, name, None), "_local_mapping", ()):
            return "the model brings its own 'sdpa'"
    if re.search(r"_attn_implementation\s*[!=]=\s*[\"']sdpa[\"']", inspect.getsource(source)):
        return "the model's code asks whether its attention is named 'sdpa'"
    return None


def switch(model: nn.Module) -> str | None:
    """Let the Hugging Face models in ``model`` attend by fastnn; :func:`restore` undoes it.

    Only this instance changes, by way of its config (and other models that were built on the very same config object).
    Only models that use ``"sdpa"`` are switched: it is what the kernels compute, with the same masks.

    Args:
        model: a ``transformers.PreTrainedModel``, or a module that contains some.

    Returns:
        The name of the former implementation, or None when there was nothing to switch.
    """
    configs = [m.config for m in _models(model) if why_not(m) is None]
    if not configs:
        return None
    _register()
    for config in configs:
        config._attn_implementation_internal = NAME
    return Former("sdpa")


class Former(str):
    """The attention a model had. Unpickled, it enters fastnn's into transformers' tables, where the model will look."""

    def __reduce__(self):
        return _unpickled, (str(self),)


def _unpickled(name: str) -> Former:
    _register()
    return Former(name)


def restore(model: nn.Module, former: str | None) -> None:
    """Undo :func:`switch`.

    Args:
        model: what was passed to :func:`switch`.
        former: what it returned; None does nothing.
    """
    if former is None:
        return
    for config in (m.config for m in _models(model)):
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = former


def _models(model: nn.Module) -> Iterator[Any]:
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        yield from (m for m in model.modules() if isinstance(m, transformers.PreTrainedModel))


def _register() -> None:
    """Enter fastnn's attention into transformers' tables, with the masks of ``"sdpa"``."""
    import transformers

    transformers.AttentionInterface.register(NAME, attention_forward)
    masks = getattr(transformers, "AttentionMaskInterface", None)
    if masks is not None:
        masks.register(NAME, masks()["sdpa"])

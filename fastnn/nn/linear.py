"""Linear: torch.nn.Linear on fastnn's kernel, with an optional activation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn import _export, functional
from fastnn._library import _C
from fastnn.nn._frozen import Frozen, parameters


class Linear(Frozen, torch.nn.Linear):
    r"""y = f(x Wᵀ + b), in one kernel.

    Args:
        in_features, out_features, bias, device, dtype: as ``torch.nn.Linear``'s.
        activation: f, a name that :func:`fastnn.functional.linear` knows, or None.

    Shape: ``[*, in_features]`` to ``[*, out_features]``. ``state_dict`` is that of ``torch.nn.Linear``.

    Source: ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    activation: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        (weight, bias), packed = parameters(self, ("weight", "bias")), None
        if self._frozen and not _export.tracing() and _C._linear_packs(input, weight):
            packed = self._packed(weight, torch.ops.fastnn.linear_pack)
        return functional.linear(input, weight, bias, activation=self.activation, packed=packed)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")

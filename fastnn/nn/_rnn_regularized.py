"""What RNN, GRU and LSTM take beyond torch's arguments: the options, and how they show."""

from __future__ import annotations

import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _probability(name: str, p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= float(p) < 1:
        raise ValueError(f"fastnn.rnn: {name} must be a number in [0, 1); got {p!r}.")
    return float(p)


class Regularized(torch.nn.RNNBase):
    """Mixin of RNN, GRU and LSTM: the keyword-only options."""

    # Of the class too: a stock module that `accelerate` swaps has no such attribute.
    recurrent_dropout = 0.0
    zoneout = 0.0

    def __init__(self, *args, recurrent_dropout: float = 0.0, zoneout: float = 0.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = _probability("zoneout", zoneout)

    @property
    def _step_by_step(self) -> bool:
        """Whether it runs step by step, for want of a kernel."""
        return self.zoneout > 0

    @property
    def _drops(self) -> bool:
        """Whether recurrent weights are dropped: other tensors at each call."""
        return self.training and self.recurrent_dropout > 0

    def _dropped(self, weights: list[Tensor]) -> list[Tensor]:
        """The flat weights, each weight_hh with entries of it set to zero and the others scaled up."""
        pairs = zip(self._flat_weights_names, weights, strict=True)
        return [F.dropout(w, self.recurrent_dropout) if name.startswith("weight_hh") else w for name, w in pairs]

    def extra_repr(self) -> str:
        set_ = {name: getattr(self, name) for name in ("recurrent_dropout", "zoneout")}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in set_.items() if value)

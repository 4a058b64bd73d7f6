"""What RNN, GRU and LSTM take beyond torch's arguments: the options, and how they show."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
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
    layer_norm = False
    recurrent_dropout = 0.0
    zoneout = 0.0
    _norm_names: Sequence[str] = ()

    def __init__(
        self, *args, layer_norm: bool = False, recurrent_dropout: float = 0.0, zoneout: float = 0.0, **kwargs
    ) -> None:
        if not isinstance(layer_norm, bool):
            raise TypeError(f"fastnn.rnn: layer_norm must be a bool; got {type(layer_norm).__name__}.")
        super().__init__(*args, **kwargs)
        self.layer_norm = layer_norm
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = _probability("zoneout", zoneout)
        if layer_norm:
            self._norm_names = []
            for weight_ih, weight_hh, *_ in self._all_weights:
                suffix, weight = weight_ih.removeprefix("weight_ih"), getattr(self, weight_hh)
                sizes = {"norm_ih": weight.shape[0], "norm_hh": weight.shape[0]}
                if self.mode == "LSTM":
                    sizes |= {"norm_c_weight": self.hidden_size, "norm_c_bias": self.hidden_size}
                for name, size in sizes.items():
                    self.register_parameter(name + suffix, torch.nn.Parameter(weight.new_empty(size)))
                    self._norm_names.append(name + suffix)
            self._reset_norms()

    def _reset_norms(self) -> None:
        for name in self._norm_names:
            torch.nn.init.constant_(getattr(self, name), 0.0 if name.startswith("norm_c_bias") else 1.0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_norms()

    @property
    def _drops(self) -> bool:
        """Whether recurrent weights are dropped: other tensors at each call."""
        return self.training and self.recurrent_dropout > 0

    def _dropped(self, weights: list[Tensor]) -> list[Tensor]:
        """The flat weights, each weight_hh with entries of it set to zero and the others scaled up."""
        pairs = zip(self._flat_weights_names, weights, strict=True)
        return [F.dropout(w, self.recurrent_dropout) if name.startswith("weight_hh") else w for name, w in pairs]

    def extra_repr(self) -> str:
        set_ = {name: getattr(self, name) for name in ("layer_norm", "recurrent_dropout", "zoneout")}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in set_.items() if value)

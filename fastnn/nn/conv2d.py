"""Conv2d: torch.nn.Conv2d on fastnn's kernels, with an optional activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._library import _C
from fastnn.functional.conv2d import conv2d, geometry
from fastnn.nn._frozen import Fold, Frozen, parameters


class Convolution(Frozen):
    """What Conv1d and Conv2d share: the constructor of torch's, and an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.activation = activation

    activation: str | None = None

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class Conv2d(Convolution, torch.nn.Conv2d):
    r"""y = f(W * x + b), in one kernel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``torch.nn.Conv2d``'s.
        activation: f, a name that :func:`fastnn.functional.conv2d` knows, or None.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to the same with K channels. ``state_dict`` is that of ``torch.nn.Conv2d``.

    Source: ``torch.nn.Conv2d``.
    """

    _fold: Fold | None = None  # the batch norm that freeze folded in

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = parameters(self, ("weight", "bias"))
        if self._fold is not None:
            weight, bias = self._fold.tensors(weight, bias)
        return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._convolve(input, weight, bias, padding)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding) -> Tensor:
        where, packed = (self.stride, padding, self.dilation), None
        if self._frozen and (self._fold is not None or weight is self._parameters.get("weight")):
            packed = self._packed(weight, torch.ops.fastnn.conv2d_pack, lambda: self._packing(input, weight, where))
        return conv2d(input, weight, bias, *where, self.groups, activation=self.activation, packed=packed)

    def _packing(self, input: Tensor, weight: Tensor, where: tuple) -> tuple | None:
        """How the weight is to be packed for this call: groups, channels_last, algorithm. None: not at all."""
        if isinstance(where[1], str):
            where = geometry(weight, *where)
        return _C._conv2d_packing(input, weight, *where, self.groups)

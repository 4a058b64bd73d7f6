"""Conv2d: torch.nn.Conv2d on fastnn's kernels, with an optional activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn import functional
from fastnn.nn._frozen import Fold, Frozen


class Conv2d(Frozen, torch.nn.Conv2d):
    r"""y = f(W * x + b), in one kernel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``torch.nn.Conv2d``'s.
        activation: f, a name that :func:`fastnn.functional.conv2d` knows, or None.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to the same with K channels. ``state_dict`` is that of ``torch.nn.Conv2d``.

    Source: ``torch.nn.Conv2d``.
    """

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

    _fold: Fold | None = None  # the batch norm that freeze folded in

    def forward(self, input: Tensor) -> Tensor:
        if self._fold is not None:
            return self._conv_forward(input, *self._fold.tensors(self.weight, self.bias))
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            packed=self._packed_for(input, weight),
        )

    def _packed_for(self, input: Tensor, weight: Tensor) -> Tensor | None:
        if not self._frozen or (self._fold is None and weight is not self.weight):
            return None
        return self._packed(weight, torch.ops.fastnn.conv2d_pack, self.groups, _channels_last(input, weight))

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def _channels_last(*tensors: Tensor) -> bool:
    """Whether the result will be channels_last (ties, as with one channel, go the other way)."""
    return any(
        t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in tensors
    )

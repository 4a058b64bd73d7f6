"""Conv2d: torch.nn.Conv2d on fastnn's kernels, with an optional activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._library import _C
from fastnn.functional.conv2d import geometry, padded_conv2d
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
        return self._padded(input, weight, bias, *geometry(weight, self.stride, padding, self.dilation))

    def _padded(self, input: Tensor, weight: Tensor, bias: Tensor | None, *where: list[int]) -> Tensor:
        """Convolve; ``where`` is stride, padding of the four sides, dilation."""
        packed = None
        if self._frozen and (self._fold is not None or weight is self.weight):
            packed = self._packed(weight, torch.ops.fastnn.conv2d_pack, lambda: self._packing(input, weight, *where))
        return padded_conv2d(input, weight, bias, *where, self.groups, self.activation, packed)

    def _packing(self, input: Tensor, weight: Tensor, stride, padding, dilation) -> tuple:
        """How the weight is to be packed for this call: groups, channels_last, algorithm."""
        algorithm = None
        if weight.shape[2:] == (3, 3) and stride == dilation == [1, 1]:
            algorithm = _C._conv2d_winograd(input, weight, stride, padding, dilation, self.groups)
        return self.groups, _channels_last(input, weight), algorithm

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def _channels_last(*tensors: Tensor) -> bool:
    """Whether the result will be channels_last (ties, as with one channel, go the other way)."""
    return any(
        t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in tensors
    )

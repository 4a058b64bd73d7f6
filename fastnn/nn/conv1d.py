"""Conv1d: torch.nn.Conv1d on fastnn's kernels, with an optional activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._library import _C
from fastnn.functional.conv1d import conv1d, row
from fastnn.functional.conv2d import geometry
from fastnn.nn._frozen import parameters
from fastnn.nn.conv2d import Convolution


class Conv1d(Convolution, torch.nn.Conv1d):
    r"""y = f(W * x + b), in one kernel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``torch.nn.Conv1d``'s.
        activation: f, a name that :func:`fastnn.functional.conv1d` knows, or None.

    Shape: ``[N, C, L]`` or ``[C, L]`` to the same with K channels. ``state_dict`` is that of ``torch.nn.Conv1d``.

    Source: ``torch.nn.Conv1d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *parameters(self, ("weight", "bias")))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        where, packed = (self.stride, self.padding, self.dilation), None
        input = input.contiguous()  # what the kernel is to read, so that the packed weight is of its layout
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            where = (self.stride, 0, self.dilation)
        if self._frozen and weight is self._parameters.get("weight"):
            packed = self._packed(weight, self._pack_row, lambda: self._packing(input, weight, where))
        return conv1d(input, weight, bias, *where, self.groups, activation=self.activation, packed=packed)

    @staticmethod
    def _pack_row(weight: Tensor, *how) -> Tensor:
        return torch.ops.fastnn.conv2d_pack(weight.unsqueeze(-2), *how)

    def _packing(self, input: Tensor, weight: Tensor, where: tuple) -> tuple | None:
        """How the weight is to be packed for this call: groups, channels_last, algorithm. None: not at all."""
        kernel = weight.unsqueeze(-2)
        return _C._conv2d_packing(input.unsqueeze(-2), kernel, *geometry(kernel, *row(*where)), self.groups)

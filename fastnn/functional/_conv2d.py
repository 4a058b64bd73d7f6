"""fastnn::conv2d under torch.func's transforms and in forward-mode AD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastnn import reference
from fastnn.functional import _batching, _transforms
from fastnn.functional._transforms import below_autograd


@dataclass(frozen=True)
class Conv2d(_transforms.Op):
    """The op for torch.func's transforms."""

    activation: str | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def _options(self):
        return self.stride, self.padding, self.dilation, self.groups, self.activation

    def forward(self, input, weight, bias):
        if self.activation in _transforms.FROM_OUTPUT:
            return (torch.ops.fastnn.conv2d(input, weight, bias, *self._options()),)
        return torch.ops.fastnn.conv2d_train(input, weight, bias, *self._options())

    def backward(self, wanted, grads, tensors, outputs):
        with below_autograd():
            return torch.ops.fastnn.conv2d_backward(grads[0], *tensors, outputs[-1], *self._options(), wanted)

    def formula(self, input, weight, bias):
        return (reference.conv2d(input, weight, bias, *self._options()),)

    def jvp(self, tensors, tangents):
        return _transforms.jvp_of_product(self, replace(self, activation=None), tensors, tangents)

    def shift(self, z, bias):
        return z + bias[:, None, None]

    batch = staticmethod(_batching.conv2d)
    batch_backward = staticmethod(_batching.conv2d_backward)


@torch.library.register_vmap("fastnn::conv2d")
def _(info, in_dims, input, weight, bias, stride, padding, dilation, groups, activation=None, packed=None):
    def call(op, *tensors):
        return (torch.ops.fastnn.conv2d(*tensors, *op._options()),)

    op = Conv2d(activation, stride, padding, dilation, groups)
    (output,), dim = _batching.conv2d(call, info.batch_size, in_dims[:3], op, input, weight, bias)
    return output, dim


@torch.library.register_vmap("fastnn::conv2d_backward")
def _(
    info, in_dims, grad_output, input, weight, bias, saved, stride, padding, dilation, groups, activation, output_mask
):
    pull = _transforms.Pull(Conv2d(activation, stride, padding, dilation, groups), tuple(output_mask), 1)
    return _transforms.batched_backward(info, in_dims[:5], pull, grad_output, input, weight, bias, saved)


_transforms.register_old_vmap("conv2d_backward")

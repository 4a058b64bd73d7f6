"""Modules that drop in for those of torch.nn: the same arguments, the same state_dict, fastnn's kernels."""

from fastnn.nn.conv2d import Conv2d
from fastnn.nn.linear import Linear

__all__ = ["Conv2d", "Linear"]

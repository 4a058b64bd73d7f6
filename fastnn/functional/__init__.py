"""Functions with the signatures of torch.nn.functional, served by fastnn's kernels."""

from fastnn.functional.conv2d import conv2d
from fastnn.functional.linear import linear

__all__ = ["conv2d", "linear"]

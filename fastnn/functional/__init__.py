"""Functions with the signatures of torch.nn.functional, served by fastnn's kernels."""

from fastnn.functional.linear import linear

__all__ = ["linear"]

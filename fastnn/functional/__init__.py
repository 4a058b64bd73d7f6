"""Functions with the signatures of torch.nn.functional, served by fastnn's kernels."""

from fastnn.functional.attention import scaled_dot_product_attention
from fastnn.functional.linear import linear

__all__ = ["linear", "scaled_dot_product_attention"]

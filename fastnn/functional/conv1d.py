"""conv1d: 1-D convolution, bias and activation, by the kernels of conv2d on images of one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastnn.functional.conv2d import conv2d


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    r"""Convolve sequences and, fused with it, add a bias and apply an activation.

    .. math:: y_{n,k,i} = f\Big(b_k + \sum_{c,s} W_{k,c,s}\, x_{n,c,i'}\Big), \quad i' = i \cdot stride + s \cdot dilation - pad

    Args:
        input: ``[N, C, L]`` or ``[C, L]``, any strides; float32, float64, bfloat16 or float16.
        weight: ``[K, C / groups, S]``, of the same dtype.
        bias: ``[K]`` or None.
        stride: an int, or a sequence of one.
        padding: an int, a sequence of one, ``"valid"`` or ``"same"``.
        dilation: an int, or a sequence of one.
        groups: how many groups the channels fall into.
        activation: f, a name that :func:`fastnn.functional.conv2d` knows, or None.
        packed: as for :func:`fastnn.functional.conv2d`, of the weight ``[K, C / groups, 1, S]``.

    Returns:
        ``[N, K, L']`` (without N for an unbatched input), contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, or padding="same" with a stride.
        TypeError: a stride, padding or dilation that is no int, sequence or, for padding, str.
        ValueError: an unknown activation.

    Source: ``torch.nn.functional.conv1d``.
    """
    for name, value, dims, shape in (
        ("input", input, (2, 3), "[C, L] or [N, C, L]"),
        ("weight", weight, (3,), "[K, C / groups, S]"),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"fastnn.conv1d: {name} must be a Tensor; got {type(value).__name__}.")
        if value.dim() not in dims:
            raise RuntimeError(f"fastnn.conv1d: {name} must be {shape}; got {list(value.shape)}.")
    where = row(stride, padding, dilation)
    image, kernel = input.contiguous().unsqueeze(-2), weight.unsqueeze(-2)
    output = conv2d(image, kernel, bias, *where, groups, activation=activation, packed=packed)
    return output.squeeze(-2).contiguous()


def row(stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any, Any]:
    """Bring conv1d's arguments to those of conv2d on one row."""
    return (
        _pair("stride", stride, 1),
        padding if isinstance(padding, str) else _pair("padding", padding, 0),
        _pair("dilation", dilation, 1),
    )


def _pair(name: str, value: Any, across: int) -> tuple[int, Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 1:
            raise RuntimeError(f"fastnn.conv1d: {name} must be an int or a sequence of one; got {value!r}.")
        return across, value[0]
    return across, value

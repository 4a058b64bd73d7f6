"""conv2d: 2-D convolution, bias and activation in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastnn import _export, _fallback, reference
from fastnn._library import _C
from fastnn.functional import _transforms
from fastnn.functional._conv2d import Conv2d


def conv2d(
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
    r"""Convolve images and, fused with it, add a bias and apply an activation.

    .. math:: y_{n,k,i,j} = f\Big(b_k + \sum_{c,r,s} W_{k,c,r,s}\, x_{n,c,i',j'}\Big), \quad
        i' = i \cdot stride + r \cdot dilation - pad, \ j' \text{ alike}

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any strides; float32, float64, bfloat16 or float16.
        weight: ``[K, C / groups, R, S]``, of the same dtype.
        bias: ``[K]`` or None.
        stride: an int or a pair.
        padding: an int, a pair, the four sides (top, bottom, left, right), ``"valid"`` (none) or ``"same"`` (output as
            large as the input; where the padding is odd, the greater half goes to the bottom and right).
        dilation: an int or a pair.
        groups: how many groups the channels fall into.
        activation: f, one of ``relu gelu gelu_tanh silu sigmoid tanh leaky_relu elu hardswish relu6 softplus mish``
            with torch's default parameters, or None.
        packed: what ``torch.ops.fastnn.conv2d_pack(weight, groups, channels_last, algorithm)`` made of this weight, for
            inference with frozen weights; left unused where the layout or the algorithm of the call is another.

    Returns:
        ``[N, K, OH, OW]`` (without N for an unbatched input), channels_last where input or weight is. Sums are kept in
        float32 (float64 for float64). 3 x 3 kernels may run by Winograd's algorithm: see :mod:`fastnn.backends`.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, or padding="same" with a stride.
        TypeError: a stride, padding or dilation that is no int, pair or, for padding, str.
        ValueError: an unknown activation.

    Source: ``torch.nn.functional.conv2d``; kernels in ``csrc/cpu/conv2d*.inl``.
    """
    tracing = _export.tracing()
    if not tracing:
        output = _C.conv2d(input, weight, bias, stride, padding, dilation, groups, activation, packed)
        if output is not None:
            return output
    where = geometry(weight, stride, padding, dilation)
    if tracing or any(isinstance(n, torch.SymInt) for part in where for n in part):
        if _fallback.why_not(input, weight, bias) is None:
            return _export.ops().conv2d(input, weight, bias, *where, groups, activation, packed)
    elif where != (stride, padding, dilation):  # now in the form that the kernels take
        return conv2d(input, weight, bias, *where, groups, activation=activation, packed=packed)
    else:
        results = _transforms.call(Conv2d(activation, *where, groups), input, weight, bias, name="conv2d")
        if results is not None:
            return results[0]
    return _fallback.fallback(
        "conv2d",
        (input, weight, bias),
        lambda: _export.Formulas.conv2d(input, weight, bias, *where, groups, activation),
    )


def geometry(weight: Tensor, stride, padding, dilation) -> tuple[list[int], list[int], list[int]]:
    """Bring :func:`conv2d`'s arguments to pairs, and the padding to top, bottom, left, right."""
    steps, spread = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        return steps, _named_padding(padding, weight, steps, spread), spread
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return steps, _pair("padding", padding[:2]) + _pair("padding", padding[2:]), spread
    rows, columns = _pair("padding", padding)
    return steps, [rows, rows, columns, columns], spread


def _pair(name: str, value) -> list[int]:
    if type(value) is int:
        return [value, value]
    if type(value) is not tuple:
        if isinstance(value, (int, torch.SymInt)):
            return [value, value]
        if hasattr(value, "__index__") and not isinstance(value, Sequence):
            return [int(value)] * 2
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"fastnn.conv2d: {name} must be an int or a pair of ints; got {value!r}.")
    if not all(hasattr(x, "__index__") or isinstance(x, torch.SymInt) for x in value):
        raise TypeError(f"fastnn.conv2d: {name} must be an int or a pair of ints; got {value!r}.")
    if len(value) == 2:
        return list(value)
    if len(value) == 1:
        return [value[0], value[0]]
    raise RuntimeError(f"fastnn.conv2d: {name} must be an int or a pair of ints; got {value!r}.")


def _named_padding(name: str, weight: Tensor, stride: list[int], dilation: list[int]) -> list[int]:
    if name == "valid":
        return [0, 0, 0, 0]
    if name != "same":
        raise RuntimeError(f"fastnn.conv2d: padding must be an int, a pair, 'same' or 'valid'; got {name!r}.")
    if stride != [1, 1]:
        raise RuntimeError(f"fastnn.conv2d: stride must be 1 with padding='same'; got {stride}.")
    if weight.dim() != 4:
        raise RuntimeError(f"fastnn.conv2d: weight must be [K, C / groups, R, S]; got {list(weight.shape)}.")
    rows, columns = (d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True))
    return [rows // 2, rows - rows // 2, columns // 2, columns - columns // 2]


def _check(input, weight, bias, stride, padding, dilation, groups) -> tuple[list[int], torch.memory_format]:
    """The output's shape (with N) and memory format; the rules are those of ``check`` in csrc/bindings/conv2d.cpp."""

    def check(condition, text):
        torch._check(condition, lambda: f"fastnn.conv2d: {text()}.")

    check(input.dim() in (3, 4), lambda: f"input must be [C, H, W] or [N, C, H, W]; got {list(input.shape)}")
    check(weight.dim() == 4, lambda: f"weight must be [K, C / groups, R, S]; got {list(weight.shape)}")
    check(
        weight.dtype == input.dtype, lambda: f"weight must have the dtype of input ({input.dtype}); got {weight.dtype}"
    )
    check(min(stride) > 0, lambda: f"stride must be positive; got {stride}")
    check(min(dilation) > 0, lambda: f"dilation must be positive; got {dilation}")
    check(min(padding) >= 0, lambda: f"padding must not be negative; got {padding}")
    check(groups > 0, lambda: f"groups must be positive; got {groups}")
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    n, channels, height, width = batched.shape
    k, per_group, r, s = weight.shape
    check(
        k > 0 and k % groups == 0,
        lambda: f"weight must have a positive multiple of groups = {groups} output channels; got {list(weight.shape)}",
    )
    check(
        channels == per_group * groups,
        lambda: (
            f"input must have {per_group * groups} channels (weight is {list(weight.shape)}, groups = {groups}); "
            f"got {list(input.shape)}"
        ),
    )
    rows, columns = height + padding[0] + padding[1], width + padding[2] + padding[3]
    reach_h, reach_w = (r - 1) * dilation[0] + 1, (s - 1) * dilation[1] + 1
    for have, reach in ((rows, reach_h), (columns, reach_w)):
        check(
            have >= reach,
            lambda: (
                f"input with its padding ({rows} x {columns}) must be no smaller than the dilated kernel; "
                f"got a kernel of {reach_h} x {reach_w}"
            ),
        )
    if bias is not None:
        check(tuple(bias.shape) == (k,), lambda: f"bias must be [{k}]; got {list(bias.shape)}")
    format = torch.contiguous_format
    if torch.channels_last in (suggest_memory_format(batched), suggest_memory_format(weight)):
        format = torch.channels_last
    k = 0 if channels == 0 else k  # torch gives no channels where it gets none
    return [n, k, (rows - reach_h) // stride[0] + 1, (columns - reach_w) // stride[1] + 1], format


def _empty(like: Tensor, shape, format: torch.memory_format, batched: bool = True) -> Tensor:
    output = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)
    return output if batched else output.squeeze(0)


@torch.library.register_fake("fastnn::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, activation=None, packed=None):
    shape, format = _check(input, weight, bias, stride, padding, dilation, groups)
    return _empty(input, shape, format, input.dim() == 4)


@torch.library.register_fake("fastnn::conv2d_train")
def _(input, weight, bias, stride, padding, dilation, groups, activation):
    shape, format = _check(input, weight, bias, stride, padding, dilation, groups)
    return tuple(_empty(input, shape, format, input.dim() == 4) for _ in range(2))


@torch.library.register_fake("fastnn::conv2d_backward")
def _(grad_output, input, weight, bias, saved, stride, padding, dilation, groups, activation, output_mask):
    _, format = _check(input, weight, bias, stride, padding, dilation, groups)
    batched = input.dim() == 4
    return (
        _empty(input, input.shape if batched else (1, *input.shape), format, batched) if output_mask[0] else None,
        _empty(weight, weight.shape, format) if output_mask[1] else None,
        weight.new_empty(weight.shape[:1]) if output_mask[2] else None,
    )


@torch.library.register_fake("fastnn::conv2d_pack")
def _(weight, groups, channels_last, algorithm=None):
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shape = _C._conv2d_packed_shape(list(weight.shape), dtype == torch.float64, groups, channels_last, algorithm)
    return weight.new_empty(shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    grad_output, input, weight, bias, _, *ctx.geometry, ctx.activation, ctx.output_mask = inputs
    ctx.save_for_backward(grad_output, input, weight, bias)


def _backward(ctx, *grad_grads):
    grad_output, *primals = ctx.saved_tensors
    grad_grad_output, grads = reference.vjp_of_vjp(
        lambda input, weight, bias: reference.conv2d(input, weight, bias, *ctx.geometry, ctx.activation),
        primals,
        (grad_output,),
        ctx.output_mask,
        grad_grads,
    )
    return (*grad_grad_output, *grads, None, None, None, None, None, None, None)


torch.library.register_autograd("fastnn::conv2d_backward", _backward, setup_context=_setup_context)

"""linear: matmul, bias and activation in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastnn import _export, _fallback, reference
from fastnn._library import _C
from fastnn.functional import _batching, _transforms
from fastnn.functional._transforms import below_autograd


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    r"""Apply a linear transformation and, fused with it, an activation.

    .. math:: y = f(x W^T + b)

    Args:
        input: ``[*, in_features]``, any leading dimensions and strides; float32, float64, bfloat16 or float16.
        weight: ``[out_features, in_features]`` or ``[in_features]``, of the same dtype.
        bias: ``[out_features]`` or None.
        activation: f, one of ``relu gelu gelu_tanh silu sigmoid tanh leaky_relu elu hardswish relu6 softplus mish``
            with torch's default parameters, or None.
        packed: what ``torch.ops.fastnn.linear_pack(weight)`` made of this weight, for inference with frozen weights.

    Returns:
        ``[*, out_features]``, or ``[*]`` for a weight of one dimension; contiguous. Sums are kept in float32
        (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: an unknown activation.

    Source: ``torch.nn.functional.linear``; kernels in ``csrc/cpu/linear.inl`` and ``csrc/cuda/linear*.cuh``.
    """
    if _export.tracing():
        if _fallback.why_not(input, weight, bias, op="linear") is None and (bias is None or bias.dim() <= 1):
            return _export.ops().linear(input, weight, bias, activation, packed)
        output = None
    else:
        output = _C.linear(input, weight, bias, activation, packed)
        if output is None and (bias is None or bias.dim() <= 1):
            output = _transforms.call(Linear(activation), input, weight, bias, name="linear")
            output = None if output is None else output[0]
    if output is None:
        output = _fallback.fallback(
            "linear",
            (input, weight, bias),
            lambda: _export.Formulas.linear(input, weight, bias, activation),
        )
    return output


def _check(input: Tensor, weight: Tensor) -> list[int]:
    """The shape of the output; the rules are those of ``check`` in csrc/bindings/linear.cpp."""
    torch._check(input.dim() >= 1, lambda: "fastnn.linear: input must have at least one dimension; got a scalar.")
    torch._check(
        input.shape[-1] == weight.shape[-1],
        lambda: (
            f"fastnn.linear: input must have in_features = {weight.shape[-1]} (weight is {list(weight.shape)}) "
            f"as its last dimension; got {list(input.shape)}."
        ),
    )
    for name, tensor in (("weight", weight),):
        torch._check(
            tensor.dtype == input.dtype,
            lambda: f"fastnn.linear: {name} must have the dtype of input ({input.dtype}); got {tensor.dtype}.",
        )
    return [*input.shape[:-1], *weight.shape[:-1]]


@torch.library.register_fake("fastnn::linear")
def _(input, weight, bias, activation=None, packed=None):
    return input.new_empty(_check(input, weight))


@torch.library.register_fake("fastnn::linear_train")
def _(input, weight, bias, activation):
    shape = _check(input, weight)
    return input.new_empty(shape), input.new_empty(shape)


def _empty_grad_weight(weight: Tensor, activation: str | None) -> Tensor:
    if activation is None and weight.dim() == 2 and not weight.is_contiguous() and weight.t().is_contiguous():
        return weight.t().new_empty(weight.t().shape).t()  # transposed_grad_weight in csrc/bindings/linear.cpp
    return weight.new_empty(weight.shape)


@torch.library.register_fake("fastnn::linear_backward")
def _(grad_output, input, weight, bias, saved, activation, output_mask):
    return (
        input.new_empty(input.shape) if output_mask[0] else None,
        _empty_grad_weight(weight, activation) if output_mask[1] else None,
        weight.new_empty(bias.shape if bias is not None else weight.shape[:-1]) if output_mask[2] else None,
    )


@torch.library.register_fake("fastnn::linear_pack")
def _(weight):
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty([_C._linear_packed_size(*weight.shape, weight.dtype == torch.float64)], dtype=dtype)


def _setup_context(ctx, inputs, output):
    grad_output, input, weight, bias, _, ctx.activation, ctx.output_mask = inputs
    ctx.save_for_backward(grad_output, input, weight, bias)


def _backward(ctx, *grad_grads):
    grad_output, *primals = ctx.saved_tensors
    grad_grad_output, grads = reference.vjp_of_vjp(
        lambda input, weight, bias: reference.linear(input, weight, bias, ctx.activation),
        primals,
        (grad_output,),
        ctx.output_mask,
        grad_grads,
    )
    return (*grad_grad_output, *grads, None, None, None)


torch.library.register_autograd("fastnn::linear_backward", _backward, setup_context=_setup_context)


@dataclass(frozen=True)
class Linear(_transforms.Op):
    """The op for torch.func's transforms."""

    activation: str | None = None

    def forward(self, input, weight, bias):
        if self.activation in _transforms.FROM_OUTPUT:
            return (torch.ops.fastnn.linear(input, weight, bias, self.activation),)
        return torch.ops.fastnn.linear_train(input, weight, bias, self.activation)

    def backward(self, wanted, grads, tensors, outputs):
        with below_autograd():
            return torch.ops.fastnn.linear_backward(grads[0], *tensors, outputs[-1], self.activation, wanted)

    def formula(self, input, weight, bias):
        return (reference.linear(input, weight, bias, self.activation),)

    def jvp(self, tensors, tangents):
        return _transforms.jvp_of_product(self, Linear(), tensors, tangents)

    def shift(self, z, bias):
        return z + bias

    batch = staticmethod(_batching.linear)
    batch_backward = staticmethod(_batching.linear_backward)


@torch.library.register_vmap("fastnn::linear")
def _(info, in_dims, input, weight, bias, activation=None, packed=None):
    def call(op, *tensors):
        return (torch.ops.fastnn.linear(*tensors, op.activation),)

    (output,), dim = _batching.linear(call, info.batch_size, in_dims[:3], Linear(activation), input, weight, bias)
    return output, dim


@torch.library.register_vmap("fastnn::linear_backward")
def _(info, in_dims, grad_output, input, weight, bias, saved, activation, output_mask):
    pull = _transforms.Pull(Linear(activation), tuple(output_mask), 1)
    return _transforms.batched_backward(info, in_dims[:5], pull, grad_output, input, weight, bias, saved)


_transforms.register_old_vmap("linear_backward")

"""Problems of the conv2d family: F.conv2d and the activation behind it, in NCHW and, for some, channels_last."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import peer
from bench.problem import Built, Problem
from fastnn.functional import conv2d
from fastnn.testing import CONV2D, Conv2dCase

ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
# Shapes that are run in channels_last too: a 1x1, a 3x3, a stem, a depthwise.
CHANNELS_LAST = ("resnet50.1x1.56", "resnet50.3x3.14", "resnet50.stem", "mobilenetv2.depthwise")


def output_size(case: Conv2dCase) -> tuple[int, int]:
    """Height and width of the output."""
    return tuple(
        (size + 2 * case.padding - case.dilation * (kernel - 1) - 1) // case.stride + 1
        for size, kernel in zip((case.height, case.width), case.kernel, strict=True)
    )


def build(case: Conv2dCase, dtype: torch.dtype, memory_format: torch.memory_format) -> Built:
    generator = torch.Generator().manual_seed(0)
    fan_in = case.channels // case.groups * case.kernel[0] * case.kernel[1]
    x = torch.randn(case.batch, case.channels, case.height, case.width, generator=generator)
    weight = (
        torch.randn(case.out_channels, case.channels // case.groups, *case.kernel, generator=generator) / fan_in**0.5
    )
    bias = torch.randn(case.out_channels, generator=generator) if case.bias else None
    activation = ACTIVATIONS[case.activation]
    geometry = (case.stride, case.padding, case.dilation, case.groups)

    def stock(x, weight, bias):
        return activation(F.conv2d(x, weight, bias, *geometry))

    def own(x, weight, bias):
        return conv2d(x, weight, bias, *geometry, activation=case.activation)

    def onnx():
        weights = {"W": weight.numpy()} | ({"B": bias.numpy()} if case.bias else {})
        attributes = {
            "strides": [case.stride] * 2,
            "pads": [case.padding] * 4,
            "dilations": [case.dilation] * 2,
            "group": case.groups,
        }
        node = ("Conv", "X W B" if case.bias else "X W", "Y", attributes)
        return peer.model([node, *peer.activation(case.activation, "Y")], {"X": x.numpy()}, weights)

    def lay_out(t):
        if t is None:
            return None
        return t.to(dtype, memory_format=memory_format) if t.dim() == 4 else t.to(dtype)

    channels_last = memory_format == torch.channels_last
    return Built(tuple(map(lay_out, (x, weight, bias))), own, stock, onnx=None if channels_last else onnx)


def problem(case: Conv2dCase, memory_format: torch.memory_format = torch.contiguous_format) -> Problem:
    height, width = output_size(case)
    outputs = case.batch * case.out_channels * height * width
    weights = case.out_channels * case.channels // case.groups * case.kernel[0] * case.kernel[1]
    details = [
        f"{case.batch}x{case.channels}x{case.height}x{case.width}->{case.out_channels}",
        f"{case.kernel[0]}x{case.kernel[1]}",
        *([f"s{case.stride}"] if case.stride > 1 else []),
        *([f"d{case.dilation}"] if case.dilation > 1 else []),
        *([f"g{case.groups}"] if case.groups > 1 else []),
        *([case.activation] if case.activation else []),
    ]
    last = memory_format == torch.channels_last
    return Problem(
        case.name + (".nhwc" if last else ""),
        " ".join(details),
        2.0 * outputs * weights / case.out_channels,
        case.batch * case.channels * case.height * case.width + weights + outputs,
        lambda dtype: build(case, dtype, memory_format),
    )


PROBLEMS = [problem(case) for case in CONV2D]
PROBLEMS += [problem(case, torch.channels_last) for case in CONV2D if case.name in CHANNELS_LAST]

"""Problems of the conv2d family: F.conv2d and the activation behind it, in NCHW and, for some, channels_last."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastnn
from bench import peer
from bench.problem import Built, Problem
from fastnn import _C
from fastnn.functional import conv2d
from fastnn.reference import ACTIVATIONS
from fastnn.testing import CONV2D, Conv2dCase

# Run in channels_last too: some of each kind.
CHANNELS_LAST = (
    "resnet50.stem",
    "resnet50.3x3.56",
    "resnet50.3x3.14",
    "resnet50.3x3.s2",
    "resnet50.1x1.56",
    "resnet50.1x1.7.b8",
    "resnet18.3x3.28.b3",
    "vgg16.3x3.28",
    "mobilenetv2.stem",
    "mobilenetv2.expand",
    "mobilenetv2.depthwise",
    "mobilenetv2.depthwise.s2",
    "mobilenetv3.depthwise5.b3",
    "efficientnet.project",
    "convnext.depthwise7.14",
    "vit.patches",
    "unet.3x3.128",
    "deeplab.dilated",
    "resnext.grouped",
    "tiny.8x64x64",
    "odd.3x3.b7",
)


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
    weight = torch.randn(case.out_channels, case.channels // case.groups, *case.kernel, generator=generator)
    weight /= fan_in**0.5
    bias = torch.randn(case.out_channels, generator=generator) if case.bias else None
    activation = ACTIVATIONS[case.activation]
    geometry = (case.stride, case.padding, case.dilation, case.groups)

    def lay_out(t):
        if t is None:
            return None
        return t.to(dtype, memory_format=memory_format) if t.dim() == 4 else t.to(dtype)

    tensors = tuple(map(lay_out, (x, weight, bias)))

    def stock(x, weight, bias):
        return activation(F.conv2d(x, weight, bias, *geometry))

    def own(x, weight, bias):
        return conv2d(x, weight, bias, *geometry, activation=case.activation)

    def frozen():
        sizes = (case.channels, case.out_channels, case.kernel, *geometry, case.bias)
        module = torch.nn.utils.skip_init(fastnn.nn.Conv2d, *sizes, dtype=dtype, activation=case.activation)
        module = module.to(memory_format=memory_format)
        with torch.no_grad():
            module.weight.copy_(tensors[1])
            if case.bias:
                module.bias.copy_(tensors[2])
        return fastnn.freeze(module.eval())

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

    def algorithm(frozen):
        four = [[case.stride] * 2, [case.padding] * 4, [case.dilation] * 2]
        return _C._conv2d_algorithm(tensors[0], tensors[1], *four, case.groups, frozen)

    onnx = None if memory_format == torch.channels_last else onnx  # it has one layout on the CPU
    return Built(tensors, own, stock, inputs=1, frozen=frozen, onnx=onnx, algorithm=algorithm)


def group(case: Conv2dCase) -> str:
    """What kind of convolution it is: each kind has its own way to be fast."""
    if case.groups > 1:
        return "depthwise" if case.groups == case.channels else "grouped"
    if case.dilation > 1:
        return "dilated"
    if case.channels <= 4:
        return "stem"
    if case.kernel == (1, 1):
        return "1x1"
    if case.kernel == (3, 3):
        if case.stride > 1:
            return "3x3 stride 2"
        return "3x3 stride 1" if min(case.channels, case.out_channels) >= 32 else ""
    return ""


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
        group=group(case),
    )


PROBLEMS = [problem(case) for case in CONV2D]
PROBLEMS += [problem(case, torch.channels_last) for case in CONV2D if case.name in CHANNELS_LAST]

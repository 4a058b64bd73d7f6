"""Problems of the linear family: F.linear and the activation behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastnn
from bench import peer
from bench.problem import Built, Problem
from fastnn import _C
from fastnn.functional import linear
from fastnn.huggingface import Conv1D
from fastnn.reference import ACTIVATIONS
from fastnn.testing import LINEAR, LinearCase


def build(case: LinearCase, dtype: torch.dtype) -> Built:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, case.in_features, generator=generator)
    weight = torch.randn(case.out_features, case.in_features, generator=generator) / case.in_features**0.5
    if case.transposed:
        weight = weight.t().contiguous().t()
    bias = torch.randn(case.out_features, generator=generator) if case.bias else None
    activation = ACTIVATIONS[case.activation]
    tensors = tuple(None if t is None else t.to(dtype) for t in (x, weight, bias))

    def stock(x, weight, bias):
        return activation(F.linear(x, weight, bias))

    if case.activation is None:
        stock = F.linear  # its own call, with nothing around it

    def own(x, weight, bias):
        return linear(x, weight, bias, activation=case.activation)

    def frozen():
        if case.transposed:
            module = Conv1D()
            module.weight, module.bias = (torch.nn.Parameter(t) for t in (tensors[1].t(), tensors[2]))
            module.activation = case.activation
            return fastnn.freeze(module.eval())
        sizes = (case.in_features, case.out_features, case.bias)
        module = torch.nn.utils.skip_init(fastnn.nn.Linear, *sizes, dtype=dtype, activation=case.activation)
        with torch.no_grad():
            module.weight.copy_(tensors[1])
            if case.bias:
                module.bias.copy_(tensors[2])
        return fastnn.freeze(module.eval())

    def onnx():
        weights = {"W": weight.T.contiguous().numpy()} | ({"B": bias.numpy()} if case.bias else {})
        nodes = [("MatMul", "X W", "Y")] + ([("Add", "Y B", "Z")] if case.bias else [])
        return peer.model([*nodes, *peer.activation(case.activation, nodes[-1][2])], {"X": x.numpy()}, weights)

    def algorithm(frozen):
        return _C._linear_algorithm(*tensors[:2], frozen)

    own = own if case.activation else linear
    return Built(tensors, own, stock, inputs=1, frozen=frozen, onnx=onnx, algorithm=algorithm)


def group(case: LinearCase) -> str:
    if case.name.startswith(("odd", "tiny")):
        return ""
    if case.rows <= 8:
        return "8 rows or fewer"
    return "16 outputs or fewer" if case.out_features <= 16 else "many rows"


def problem(case: LinearCase) -> Problem:
    m, n, k = case.rows, case.out_features, case.in_features
    shape = f"{m}x{k}->{n} {case.activation or ''}".strip()
    elements = m * k + n * k + m * n
    return Problem(case.name, shape, 2.0 * m * n * k, elements, lambda dtype: build(case, dtype), group=group(case))


PROBLEMS = [problem(case) for case in LINEAR]

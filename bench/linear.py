"""Problems of the linear family: F.linear and the activation behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import peer
from bench.problem import Built, Problem
from fastnn.functional import linear
from fastnn.reference import ACTIVATIONS
from fastnn.testing import LINEAR, LinearCase


def build(case: LinearCase, dtype: torch.dtype) -> Built:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, case.in_features, generator=generator)
    weight = torch.randn(case.out_features, case.in_features, generator=generator) / case.in_features**0.5
    bias = torch.randn(case.out_features, generator=generator) if case.bias else None
    activation = ACTIVATIONS[case.activation]

    def stock(x, weight, bias):
        return activation(F.linear(x, weight, bias))

    if case.activation is None:
        stock = F.linear  # its own call, with nothing around it

    def own(x, weight, bias):
        return linear(x, weight, bias, activation=case.activation)

    def onnx():
        weights = {"W": weight.T.contiguous().numpy()} | ({"B": bias.numpy()} if case.bias else {})
        nodes = [("MatMul", "X W", "Y")] + ([("Add", "Y B", "Z")] if case.bias else [])
        return peer.model([*nodes, *peer.activation(case.activation, nodes[-1][2])], {"X": x.numpy()}, weights)

    tensors = tuple(None if t is None else t.to(dtype) for t in (x, weight, bias))
    return Built(tensors, own if case.activation else linear, stock, onnx=onnx)


def problem(case: LinearCase) -> Problem:
    m, n, k = case.rows, case.out_features, case.in_features
    shape = f"{m}x{k}->{n} {case.activation or ''}".strip()
    return Problem(case.name, shape, 2.0 * m * n * k, m * k + n * k + m * n, lambda dtype: build(case, dtype))


PROBLEMS = [problem(case) for case in LINEAR]

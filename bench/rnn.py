"""Problems of the rnn family: whole sequences through nn.RNN, nn.GRU and nn.LSTM, and one step of their cells.

torch.compile is a peer of the cells alone: Dynamo breaks the graph at nn.RNN, nn.GRU and nn.LSTM and leaves them to eager.
With ``torch._dynamo.config.allow_rnn`` it unrolls a GRU over its steps, and 98 of them take minutes to compile.
"""

from __future__ import annotations

import copy
from functools import partial

import torch

import fastnn
from bench import peer
from bench.problem import Built, Problem
from fastnn import nn
from fastnn.testing import RNN, RnnCase

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def modules(case: RnnCase) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The stock module and fastnn's, with the same weights."""
    name = {"lstm": "LSTM", "gru": "GRU"}.get(case.kind, "RNN")
    kwargs = {"nonlinearity": case.kind[4:]} if name == "RNN" else {}
    if case.time:
        kwargs |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
        kwargs |= {"proj_size": case.proj_size} if case.proj_size else {}
    else:
        name += "Cell"
    torch.manual_seed(0)
    stock = getattr(torch.nn, name)(case.input_size, case.hidden_size, **kwargs)
    own = getattr(nn, name)(case.input_size, case.hidden_size, **kwargs)
    own.load_state_dict(stock.state_dict())
    return stock, own


def build(case: RnnCase, dtype: torch.dtype) -> Built:
    generator = torch.Generator().manual_seed(0)
    shape = (case.time, case.batch, case.input_size) if case.time else (case.batch, case.input_size)
    x = torch.randn(shape, generator=generator)
    stock, own = modules(case)
    onnx = None if case.proj_size else partial(model, case, x, stock.state_dict())  # ONNX has no projection
    own, stock = own.to(dtype), stock.to(dtype)

    def frozen():
        return fastnn.freeze(copy.deepcopy(own).eval())

    return Built((x.to(dtype),), own, stock, frozen=frozen, onnx=onnx, compiles=not case.time)


def model(case: RnnCase, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[bytes, dict]:
    """The same as an ONNX graph: a node for each layer, a cell as a sequence of one step."""
    weights, source, nodes = {}, "X", []
    ways = ("", "_reverse") if case.bidirectional else ("",)
    attributes = {"hidden_size": case.hidden_size, "direction": "bidirectional" if case.bidirectional else "forward"}
    if case.kind == "gru":
        attributes["linear_before_reset"] = 1
    if case.kind == "rnn_relu":
        attributes["activations"] = ["Relu"] * len(ways)
    if not case.time:
        weights["STEP"] = torch.tensor([1, *x.shape]).numpy()
        source, nodes = "SEQUENCE", [("Reshape", "X STEP", "SEQUENCE")]
    for layer in range(case.layers):
        suffixes = [f"_l{layer}{way}" if case.time else "" for way in ways]

        def stacked(kind):  # [ways, gates * hidden_size, …], gates in ONNX's order
            return torch.stack([reordered(state[kind + suffix], case.kind) for suffix in suffixes])

        weights[f"W{layer}"], weights[f"R{layer}"] = stacked("weight_ih").numpy(), stacked("weight_hh").numpy()
        weights[f"B{layer}"] = torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1).numpy()
        operator = "RNN" if case.kind.startswith("rnn") else case.kind.upper()
        nodes.append((operator, f"{source} W{layer} R{layer} B{layer}", f"Y{layer}", attributes))  # Y: [T, ways, B, H]
        source = f"Y{layer}"
        if case.bidirectional:
            source = f"T{layer}"
            nodes.append(("Transpose", f"Y{layer}", source, {"perm": [0, 2, 1, 3]}))
        nodes.append(("Reshape", f"{source} SHAPE", f"H{layer}" if layer < case.layers - 1 else "OUT"))
        source = f"H{layer}"
    outputs = len(ways) * case.hidden_size
    weights["SHAPE"] = torch.tensor([*x.shape[:-1], outputs]).numpy()
    return peer.model(nodes, {"X": x.numpy()}, weights)


def reordered(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the rows of a weight or bias with the gates in ONNX's order: i o f c for i f g o, z r n for r z n."""
    order = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}.get(kind, (0,))
    gates = weight.chunk(len(order))
    return torch.cat([gates[i] for i in order])


def group(case: RnnCase) -> str:
    if case.name.startswith("odd"):
        return ""
    if not case.time:
        return "cells"
    return "sequences of batch 1" if case.batch == 1 else "sequences of batches"


def problem(case: RnnCase) -> Problem:
    gates, state = GATES[case.kind], case.proj_size or case.hidden_size
    directions, steps = 2 if case.bidirectional else 1, case.time or 1
    flops = elements = 0
    for layer in range(case.layers):
        inputs = case.input_size if layer == 0 else state * directions
        weights = gates * case.hidden_size * (inputs + state) + case.proj_size * case.hidden_size
        flops += 2.0 * directions * steps * case.batch * weights
        elements += directions * weights + steps * case.batch * (inputs + directions * state)
    shape = f"T{case.time or 1} B{case.batch} {case.input_size}->{case.hidden_size}"
    shape += f" x{case.layers}" if case.layers > 1 else ""
    shape += " both ways" if case.bidirectional else ""
    shape += f" proj {case.proj_size}" if case.proj_size else ""
    kind = case.kind if case.time else f"{case.kind} cell"
    return Problem(case.name, f"{kind} {shape}", flops, elements, partial(build, case), group=group(case))


PROBLEMS = [problem(case) for case in RNN]

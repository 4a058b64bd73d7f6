"""Problems of the rnn family: whole sequences through nn.RNN, nn.GRU and nn.LSTM, and one step of their cells."""

from __future__ import annotations

import torch

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
    return Built((x.to(dtype),), own.to(dtype), stock.to(dtype))


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
    return Problem(case.name, f"{kind} {shape}", flops, elements, lambda dtype: build(case, dtype))


PROBLEMS = [problem(case) for case in RNN]

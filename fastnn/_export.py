"""Leaving fastnn: its ops in torch's own operators, for ONNX and for programs that run where fastnn is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from fastnn import reference


def tracing() -> bool:
    """Whether a tracer watches: torch.compile, torch.export, torch.jit.trace, an ONNX exporter."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def ops() -> Any:
    """What a traced call consists of: the ops, or their formulas while ``torch.onnx.export`` is at work."""
    return Formulas if torch.onnx.is_in_onnx_export() else torch.ops.fastnn


class Formulas:
    """The arguments and results of each op, computed by torch's own operators: for exporters, and where no kernel serves."""

    @staticmethod
    def linear(input, weight, bias, activation=None, packed=None):
        return reference.activate(F.linear(input, weight, bias), activation)

    @staticmethod
    def conv2d(input, weight, bias, stride, padding, dilation, groups, activation=None, packed=None):
        top, bottom, left, right = padding
        if top != bottom or left != right:
            input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
        return reference.activate(F.conv2d(input, weight, bias, stride, (top, left), dilation, groups), activation)

    @staticmethod
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
                  window=None, softcap=None, philox_seed=None):  # fmt: skip
        options = (dropout_p, is_causal, scale, enable_gqa, window, softcap, philox_seed)
        output, lse = reference.attention(query, key, value, attn_mask, *options)
        if window is None and not softcap and not dropout_p:
            mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
            output = F.scaled_dot_product_attention(
                query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return output, lse  # of the two, exporters drop what nobody uses

    attention_weights = staticmethod(reference.attention_weights)

    @staticmethod
    def rnn(input, batch_sizes, hx, cx, weights, mode, packed=None, norms=None, zoneout_mask=None, zoneout=0.0):
        if input.dim() == 2 and batch_sizes is None:
            return _cell(input, hx, cx, weights, mode)
        plain = not norms and not zoneout and zoneout_mask is None
        to_onnx = torch.onnx.is_in_onnx_export()
        if not plain or (to_onnx and len(weights) % 2):  # ONNX has no projection of the state either
            m = zoneout or None if zoneout_mask is None else zoneout_mask.to(input.dtype)
            return reference.rnn(input, batch_sizes, hx, cx, weights, mode, m, norms or None)
        if to_onnx and torch._C._get_tracing_state() is None:  # the TorchScript exporter knows torch's operators alone
            return _onnx_rnn(input, hx, cx, weights, mode)
        return _layer(input, batch_sizes, hx, cx, weights, mode)


def _cell(input, hx, cx, weights, mode):
    empty = input.new_empty(0)
    if mode == "LSTM":
        h, c = torch.lstm_cell(input, (hx, cx), *weights)
        return h, empty, c
    step = {"RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell, "GRU": torch.gru_cell}[mode]
    return step(input, hx, *weights), empty, empty


def _layer(input, batch_sizes, hx, cx, weights, mode):
    stack: Any = {"RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu, "LSTM": _VF.lstm, "GRU": _VF.gru}[mode]
    directions = int(hx.shape[0])  # a tensor under torch.jit.trace
    rest = (len(weights) // directions >= 4, 1, 0.0, False, directions == 2)
    states = hx if cx is None else (hx, cx)
    if batch_sizes is None:
        output, *last = stack(input, states, list(weights), *rest, False)
    else:
        output, *last = stack(input, batch_sizes, states, list(weights), *rest)
    return output, last[0], last[1] if cx is not None else input.new_empty(0)


# Where ONNX has a gate of torch's: LSTM i f g o as i o f c, GRU r z n as z r h.
_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


def _onnx_rnn(input: Tensor, hx: Tensor, cx: Tensor | None, weights: list[Tensor], mode: str):
    """A layer as the one operator that ONNX has for it; torch's exporter unrolls some, and then fixes the length."""
    directions, batch, hidden = hx.shape
    each = len(weights) // directions

    def gates(index: int) -> Tensor:
        parts = [weights[d * each + index].chunk(len(_ORDER[mode])) for d in range(directions)]
        return torch.stack([torch.cat([part[gate] for gate in _ORDER[mode]]) for part in parts])

    bias = torch.cat((gates(2), gates(3)), 1) if each == 4 else None
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if mode == "GRU":
        attributes["linear_before_reset"] = 1
    elif mode != "LSTM":
        attributes["activations"] = ["Tanh" if mode == "RNN_TANH" else "Relu"] * directions
    states = [hx] if cx is None else [hx, cx]
    shapes = [[input.shape[0], directions, batch, hidden], *[[directions, batch, hidden]] * len(states)]
    output, *last = torch.onnx.ops.symbolic_multi_out(
        mode.split("_")[0],
        [input, gates(0), gates(1), bias, None, *states],
        attributes,
        dtypes=[input.dtype] * len(shapes),
        shapes=shapes,
    )
    return output.transpose(1, 2).flatten(2), last[0], last[1] if cx is not None else input.new_empty(0)


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The ops of fastnn in torch's own operators: what takes fastnn out of a program.

    ``program.run_decompositions(fastnn.decompositions())`` of a ``torch.export.ExportedProgram`` runs where fastnn is not
    installed, on torch's kernels. ``torch.onnx.export`` of a model needs no such step.

    Returns:
        For each op that a forward consists of, a function with its arguments and results.
    """
    names = ("linear", "conv2d", "attention", "attention_weights", "rnn")
    return {getattr(torch.ops.fastnn, name).default: getattr(Formulas, name) for name in names}

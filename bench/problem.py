"""The contract between the benchmark and the families (bench/linear.py, conv2d.py, rnn.py, attention.py).

A family is a module with ``PROBLEMS: list[Problem]``. A problem knows what it is and how much work it does; its
``build(dtype)`` makes the tensors and the callables that take turns on them. The float64 oracle, the gradients, the
threads and the clock are measure.py's, the printing is table.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Built:
    """One problem at one dtype, ready to run.

    Attributes:
        tensors: the arguments of both callables. Floating ones get gradients in training, as do the parameters of
            callables that are modules. A tensor that shall not (a mask) is listed in ``constant``.
        fastnn: called as ``fastnn(*tensors)``; a function, or a module with the same weights as torch's.
        torch: the same for torch eager. On float64 copies of the tensors it is the oracle.
        constant: positions in ``tensors`` of what wants no gradient.
        inputs: how many of ``tensors`` come anew with each call; the others are weights. None: all.
        frozen: makes fastnn's module after ``fastnn.freeze``, called with the inputs alone, or None where there is none.
        onnx: makes the ONNX model and its feeds (see bench/peer.py: ``model``), or None where there is none.
        compiles: whether torch.compile takes torch's side at all.
        algorithm: says which algorithm a call would run, given whether its weights are frozen, or None where the op does
            not tell.

    A callable may return a tuple: its first element is what is compared and what gets the gradient.
    """

    tensors: tuple[torch.Tensor | None, ...]
    fastnn: Callable
    torch: Callable
    constant: tuple[int, ...] = ()
    inputs: int | None = None
    frozen: Callable[[], torch.nn.Module] | None = None
    onnx: Callable[[], tuple[bytes, dict]] | None = None
    compiles: bool = True
    algorithm: Callable[[bool], str] | None = None


@dataclass
class Problem:
    """One row of the table.

    Attributes:
        id: unique in its family, as in fastnn.testing's cases: ``bert.up``.
        shape: what is computed, in a few characters: ``128x768->3072 gelu``.
        flops: multiply-adds of the forward, each counted as 2. Training counts three times as much.
        elements: elements of every input, weight and output, once. They cost memory time where together they are larger
            than the last cache.
        build: makes the tensors and callables for a dtype.
        directions: which directions make sense here.
        group: which problems of its kind it is told with in the summary, or nothing.
        note: what a reader has to know about this row.
    """

    id: str
    shape: str
    flops: float
    elements: float
    build: Callable[[torch.dtype], Built]
    directions: tuple[str, ...] = field(default=("forward", "training"))
    group: str = ""
    note: str = ""

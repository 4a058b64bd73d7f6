"""The contract between the CUDA benchmark and its families (bench/cuda_linear.py, bench/cuda_attention.py).

A family is a module with ``CASES: list[Case]``, the important ones first: a run ends when its time does. The clock is
cuda_measure.py's, the printing cuda_table.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Tensors = tuple[torch.Tensor | None, ...]
Results = list[torch.Tensor]

# float32 is IEEE (torch.backends.cuda.matmul.allow_tf32 off); tf32 is float32 tensors with it on.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
}
# An error above this, and above twice torch's, is a mistake and no rounding.
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 5e-5, "tf32": 5e-3, "float64": 1e-11}


@dataclass
class Arms:
    """The two sides of a case.

    Attributes:
        draw: makes one set of inputs, new random numbers with each call.
        own: fastnn, called as ``own(*tensors)``; gives the list of results.
        peers: torch's ways, called likewise. The fastest stands in the table. One that raises is left out; one named
            "x, …" is tried where x was left out.
        check: gives pairs of (what was found, what is right in float64) for the tensors and the results of a call. It
            may look at a sample of the results.
        prepare: for each set made once, before the clock runs: ``prepare(function, tensors)`` gives the call that is
            timed (for a backward, whose forward has then run). None: the function on the tensors.
    """

    draw: Callable[[], Tensors]
    own: Callable[..., Results]
    peers: dict[str, Callable[..., Results]]
    check: Callable[[Tensors, Results], list[tuple[torch.Tensor, torch.Tensor]]]
    prepare: Callable[[Callable, Tensors], Callable[[], Results]] | None = None


@dataclass
class Case:
    """One row of the table.

    Attributes:
        family, id, dtype, direction: name the row. Directions are forward, backward (the gradients alone) and training
            (both).
        shape: what is computed, in a few characters.
        flops: multiply-adds, each counted as 2.
        moved: bytes of every input and output, once.
        build: makes the arms on a device.
        first: whether a goal is told from this row; such rows are run first.
        note: what a reader has to know.
    """

    family: str
    id: str
    dtype: str
    direction: str
    shape: str
    flops: float
    moved: float
    build: Callable[[str], Arms] = field(repr=False)
    first: bool = False
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.family, self.id, self.dtype, self.direction


def sample(size: int, count: int) -> torch.Tensor:
    """Return up to ``count`` indices below ``size``: the first, the last, and others at random between them."""
    if size <= count:
        return torch.arange(size)
    inner = torch.randperm(size - 2)[: count - 2] + 1
    return torch.cat((torch.tensor([0, size - 1]), inner)).sort().values

"""The memory that a call takes beyond its inputs and its results: the kernels' own and torch's allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fastnn import _C


def extra(call: Callable[[], Iterable[torch.Tensor | None]]) -> int:
    """Run a call and return the bytes that it held at most, beyond what it returns.

    Counted are the buffers of fastnn's kernels (csrc/cpu/scratch.h) and what goes through torch's CPU allocator, oneDNN's
    working memory among it; what MKL allocates for itself is not seen.
    """
    _C.probe_allocations(True)
    try:
        _C.probe_scratch_reset()
        results = list(call())
        peak = _C.probe_scratch_peak()
    finally:
        _C.probe_allocations(False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results if t is not None}
    return max(0, peak - sum(storages.values()))

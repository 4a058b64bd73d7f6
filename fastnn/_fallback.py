"""What happens to a call that no kernel of fastnn serves: torch's own operator, a record of it, or an error."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from fastnn._library import _C

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_mode = "torch"
calls: Counter[tuple[str, str]] = Counter()  # (op, reason) -> how often torch served it


class _Last(threading.local):
    """The last call of this thread."""

    reason: str | None = None  # why it went to torch, for who set it to None before
    passing = False  # whether every fastnn.patch is to let calls pass


last = _Last()


@contextmanager
def unpatched() -> Iterator[None]:
    """Let torch's own functions compute, inside a :class:`fastnn.patch`, too. Also a decorator."""
    before, last.passing = last.passing, True
    try:
        yield
    finally:
        last.passing = before


def set_fallback(mode: str) -> None:
    """Choose what a call without a kernel does: ``"torch"`` (default) uses torch's operator, ``"error"`` raises.

    Args:
        mode: ``"torch"`` or ``"error"``.

    Raises:
        ValueError: for any other mode.
    """
    global _mode
    if mode not in ("torch", "error"):
        raise ValueError(f"fastnn.set_fallback: mode must be 'torch' or 'error'; got {mode!r}.")
    _mode = mode


def get_fallback() -> str:
    """Return the mode that :func:`set_fallback` chose."""
    return _mode


def takes_class(cls: type) -> bool:
    """Whether tensors of this subclass go to the ops: those whose class leaves calls to the dispatcher, as DTensor does."""
    if cls.__torch_function__ is not torch._C._disabled_torch_function_impl:
        return False
    _tell_dtensor()
    return True


def _tell_dtensor() -> None:
    """Give DTensor the rules of the ops, once somebody has imported it."""
    if "torch.distributed.tensor" in sys.modules:
        import fastnn.distributed.sharding  # noqa: F401


def why_not(*tensors: torch.Tensor | None, op: str = "") -> str | None:
    """Say why no kernel takes these tensors, or None when one does; ``op`` may have kernels for CUDA too."""
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0 or _differentiated():
            return "a gradient or tangent of torch.func has no kernel while torch.compile traces"
        _tell_dtensor()  # tracing passes by takes_class
    devices = ("cpu", "meta", "cuda") if op in _C.cuda_ops else ("cpu", "meta")
    for t in tensors:
        if t is None:
            continue
        if t.device.type not in devices:
            return f"device {t.device.type} has no kernel"
        if t.layout != torch.strided:
            return f"layout {t.layout} has no kernel"
        if t.dtype not in _DTYPES:
            return f"dtype {t.dtype} has no kernel"
        if t.is_nested:
            return "nested tensors have no kernel"
    return None


def _differentiated() -> bool:
    """Whether a transform of torch.func differentiates: the C++ Functions, which a graph would hold, do not know it."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in stack)


# torch.compiler.assume_constant_result, without its import of Dynamo: Dynamo runs the transforms that it traces, and guards
# on those around it.
_differentiated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fallback(op: str, tensors: tuple[torch.Tensor | None, ...], call: Callable[[], torch.Tensor], reason: str = ""):
    """Serve ``op`` by torch through ``call``, or raise under ``set_fallback("error")``."""
    reason = reason or why_not(*tensors, op=op) or "tensor subclass has no kernel"
    if _mode == "error":
        raise RuntimeError(
            f"fastnn.{op}: no kernel takes this input: {reason}. Call fastnn.set_fallback('torch') to let torch serve it."
        )
    if not torch.compiler.is_compiling():
        calls[(op, reason)] += 1
    if not torch.compiler.is_dynamo_compiling():  # a trace by other means keeps the reason: fastnn.rewrite asks for it
        last.reason = reason
    return call()

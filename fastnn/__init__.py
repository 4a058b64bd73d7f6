"""fastnn: hand-written kernels for linear, conv2d, rnn and attention, as drop-in functions and modules for PyTorch."""

import importlib
import sys

__version__ = "0.1.0"

try:
    from fastnn import backends, functional, nn
    from fastnn._fallback import get_fallback, set_fallback
    from fastnn.accelerate import accelerate, explain, restore
    from fastnn.freeze import freeze
    from fastnn.patch import patch
except ImportError:
    if not (sys.argv[:1] == ["-m"] and "fastnn.info" in sys.orig_argv):  # that one runs to tell why
        raise

__all__ = [
    "accelerate",
    "backends",
    "explain",
    "freeze",
    "functional",
    "get_fallback",
    "nn",
    "patch",
    "restore",
    "set_fallback",
]


def __getattr__(name: str):
    """``fastnn.compile``, the backend of torch.compile, is imported when it is asked for: it imports Dynamo."""
    if name == "compile":
        return importlib.import_module("fastnn.compile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""fastnn: hand-written kernels for linear, conv2d, rnn and attention, as drop-in functions and modules for PyTorch."""

import sys

__version__ = "0.1.0"

try:
    from fastnn import backends, distributed, functional, nn
    from fastnn._fallback import get_fallback, set_fallback
    from fastnn.accelerate import accelerate, explain, restore
    from fastnn.freeze import freeze
except ImportError:
    if not (sys.argv[:1] == ["-m"] and "fastnn.info" in sys.orig_argv):  # that one runs to tell why
        raise

__all__ = [
    "accelerate",
    "backends",
    "distributed",
    "explain",
    "freeze",
    "functional",
    "get_fallback",
    "nn",
    "restore",
    "set_fallback",
]

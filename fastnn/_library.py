"""Loads the compiled extension; when it cannot, one ImportError says what to do."""

import importlib

import torch

try:
    _C = importlib.import_module("fastnn._C")  # `from fastnn import _C` would blame a circular import
except ImportError as error:
    raise ImportError(
        f"fastnn: the compiled extension fastnn._C does not load ({error}). It is built against one torch "
        f"(this one is {torch.__version__}); build it again with: pip install --no-build-isolation . "
        "and see python -m fastnn.info"
    ) from error

__all__ = ["_C"]

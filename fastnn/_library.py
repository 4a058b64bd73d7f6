"""Loads the compiled extension; when it cannot, one ImportError says what to do."""

import torch

try:
    from fastnn import _C
except ImportError as error:
    raise ImportError(
        f"fastnn: the compiled extension fastnn._C does not load ({error}). It is built against one torch "
        f"(this one is {torch.__version__}); build it again with: pip install --no-build-isolation . "
        "and see python -m fastnn.info"
    ) from error

__all__ = ["_C"]

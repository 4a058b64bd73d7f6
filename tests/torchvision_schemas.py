"""Lets timm and torchvision be imported where torchvision's operators do not load; no test calls one of them.

The wheel of torchvision on PyPI is built with CUDA. Beside a CPU build of torch its library does not load; importing it then ends
with "operator torchvision::nms does not exist", where it registers a fake for it, and so does importing timm and most
models of transformers. Declaring the schemas is enough.
"""

import importlib.util
import sys
from pathlib import Path

import torch

BESIDE = Path(__file__).parent.parent / "build" / "timm"  # where the Makefile puts the two


def declare() -> None:
    """Declare the operators that torchvision registers fakes for, if it is installed and its library does not load."""
    if BESIDE.is_dir() and importlib.util.find_spec("timm") is None:
        sys.path.append(str(BESIDE))
    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C*.so") if spec and spec.origin else ():
        try:
            torch.ops.load_library(library)
        except OSError:
            for name in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )

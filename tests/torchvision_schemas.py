"""Lets torchvision be imported where its operators do not load; no test calls one of them.

The wheel of torchvision on PyPI is built with CUDA. Beside a CPU build of torch its library does not load; importing it then ends
with "operator torchvision::nms does not exist", where it registers a fake for it, and so does importing timm and most
models of transformers. Declaring the schemas is enough.
"""

import importlib.util
from pathlib import Path

import torch


def declare() -> None:
    """Declare the operators that torchvision registers fakes for, if it is installed and its library does not load."""
    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C*.so") if spec and spec.origin else ():
        try:
            torch.ops.load_library(library)
        except OSError:
            for name in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )

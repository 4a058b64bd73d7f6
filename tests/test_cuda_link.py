"""tests/cuda_link.py, which make check-cuda-link runs on a CUDA build: its logic, on any build."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastnn  # noqa: F401
from fastnn import _C

spec = importlib.util.spec_from_file_location("cuda_link", Path(__file__).with_name("cuda_link.py"))
cuda_link = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_link)

DEFINED = {"fastnn::linear", "fastnn::linear_train", "fastnn::linear_backward", "fastnn::linear_pack", "fastnn::conv2d"}
KERNELS = {(name, key) for name in DEFINED - {"fastnn::linear_pack"} for key in ("CPU", "CUDA")} - {
    ("fastnn::conv2d", "CUDA")
}


def mistakes(ops=("linear",), defined=DEFINED, kernels=KERNELS):
    return cuda_link.mistakes(ops, defined, lambda name, key: (name, key) in kernels)


def test_what_is_registered_as_it_should_be():
    assert mistakes() == []


def test_what_is_missing_or_too_much_is_told():
    assert "built without CUDA" in mistakes(())[0]
    gone = KERNELS - {("fastnn::linear_backward", "CUDA")}
    assert mistakes(kernels=gone) == ["fastnn::linear_backward has no CUDA kernel"]
    more = KERNELS | {("fastnn::conv2d", "CUDA")}
    assert mistakes(kernels=more) == ["fastnn::conv2d has a CUDA kernel, and cuda_ops does not say so"]
    assert mistakes(("linear", "conv2d"), kernels=more) == []
    composite = KERNELS - {("fastnn::linear_backward", key) for key in ("CPU", "CUDA")}  # made of torch's operators
    assert mistakes(kernels=composite) == []
    assert mistakes(("linear", "rnn")) == ["fastnn::rnn has no CPU kernel"]


def test_this_build():
    """The table of the build at hand is told as it is."""
    defined = cuda_link.defined()
    found = cuda_link.mistakes(_C.cuda_ops, defined, cuda_link.has_kernel)
    assert bool(found) is not bool(_C.cuda_ops)
    names = [f"fastnn::linear{kind}" for kind in cuda_link.KINDS]
    assert cuda_link.operators("linear", cuda_link.has_kernel) == names
    asked = cuda_link.mistakes(("linear",), defined, lambda name, key: key == "CPU")
    assert asked == [f"{name} has no CUDA kernel" for name in names]
    if _C.cuda_ops:
        cuda_link.check_info(_C.cuda_ops)


def test_the_cpu_s_kernels_serve():
    cuda_link.check_cpu()


def test_without_a_gpu_torch_says_so():
    assert ("a GPU is here" if torch.cuda.is_available() else "no GPU is here") in cuda_link.check_without_a_gpu()


def test_a_build_without_cuda_is_refused():
    if torch.version.cuda is None:
        with pytest.raises(AssertionError, match="built without CUDA"):
            cuda_link.main()

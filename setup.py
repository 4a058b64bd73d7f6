"""Build of fastnn's extension: one table of sources, one list of flags. Metadata is in pyproject.toml."""

import os
import platform
import re
import shlex
from pathlib import Path

import setuptools
from setuptools import setup

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not read the licence in pyproject.toml
    raise SystemExit(
        f"fastnn: building needs setuptools >= 77, and this is {setuptools.__version__}. "
        "Run: pip install --upgrade 'setuptools>=77'"
    )

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "fastnn: building needs the torch that it will run with. "
        "Install torch, then run: pip install --no-build-isolation ."
    ) from error

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = ("baseline", "avx2", "avx512") if X86 else ("baseline",)


CUDA_ARCHS = "7.5 8.0+PTX 8.6 8.9 9.0a 10.0f 12.0f"  # where TORCH_CUDA_ARCH_LIST asks for no others


def wants_cuda() -> bool:
    """Whether the CUDA kernels are built: FASTNN_CUDA is 0, 1 or auto (where torch and the machine can). Says why not."""
    asked = os.environ.get("FASTNN_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"fastnn: FASTNN_CUDA must be 0, 1 or auto; got {asked!r}.")
    reason = None
    if asked == "0":
        reason = "FASTNN_CUDA is 0"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        reason = "nvcc was not found (CUDA_HOME says where it is)"
    if reason and asked == "1":
        raise SystemExit(f"fastnn: FASTNN_CUDA is 1, but {reason}.")
    if reason:
        print(f"fastnn: builds the CPU kernels alone: {reason}.")
    return reason is None


def architectures() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX") or CUDA_ARCHS; a GPU is never asked."""
    options = []
    for name in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or CUDA_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            raise SystemExit(
                f"fastnn: TORCH_CUDA_ARCH_LIST must list numbers such as 8.0, 9.0a or 8.6+PTX; got {name!r}."
            )
        number = match[1] + match[2]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def sources(cuda: bool) -> list[str]:
    """Every .cpp of csrc, less the stubs of ISAs that this platform does not have, and where wanted every .cu."""
    missing = {"avx2", "avx512"} - set(ISAS)
    patterns = ("*/*.cpp", "*/*.cu") if cuda else ("*/*.cpp",)
    files = sorted(path.relative_to(ROOT).as_posix() for glob in patterns for path in (ROOT / "csrc").glob(glob))
    return [name for name in files if not any(name.endswith(f"_{isa}.cpp") for isa in missing)]


FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c is one FMA where the ISA has it; everything else stays IEEE
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-tree-loop-distribute-patterns",  # a loop over a short row is faster than a call of memset
    "-Wall",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    "-Wno-ignored-attributes",
    "-Wno-unknown-pragmas",
    *shlex.split(os.environ.get("FASTNN_CXXFLAGS", "")),  # last, so that it may change the optimisation level
]

CUDA = wants_cuda()

setup(
    ext_modules=[
        (CUDAExtension if CUDA else CppExtension)(
            "fastnn._C",
            sources(CUDA),
            include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
            extra_compile_args={"cxx": [*FLAGS, "-DFASTNN_CUDA"], "nvcc": ["-O3", "--threads=2", *architectures()]}
            if CUDA
            else FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

"""Build of fastnn's extension: one table of sources, one list of flags. Metadata is in pyproject.toml."""

import os
import platform
import shlex
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "fastnn: building needs the torch that it will run with. "
        "Install torch, then run: pip install --no-build-isolation ."
    ) from error

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = ("baseline", "avx2", "avx512") if X86 else ("baseline",)


def sources() -> list[str]:
    """Every .cpp of csrc, less the stubs of ISAs that this platform does not have."""
    missing = {"avx2", "avx512"} - set(ISAS)
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*/*.cpp"))
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

setup(
    ext_modules=[
        CppExtension(
            "fastnn._C",
            sources(),
            include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

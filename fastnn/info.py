"""Tells what fastnn runs on, and what to do about what does not work: ``python -m fastnn.info``."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

_VARIABLES = ("FASTNN_", "OMP_", "GOMP_", "KMP_", "MKL_", "LD_PRELOAD", "ATEN_CPU_CAPABILITY", "TORCH_CPU_ALLOC")


@dataclass
class Info:
    """What was found, as (name, value) rows, and the problems, each with its way out."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name.ljust(width)}  {value}" for name, value in self.rows]
        return "\n".join(lines + [f"problem: {p}" for p in self.problems])


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def openmp_runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes that this process has loaded (Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*", maps)))


def collect() -> Info:
    """Look at torch, the extension, the processor, the threads and the environment.

    Returns:
        Rows to print and problems; nothing raises, whatever is broken.
    """
    info = Info()
    info.rows += [
        ("fastnn", _version()),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("cpu", f"{cpu_model()}, {os.cpu_count()} logical cores"),
    ]
    if _torch(info):
        _extension(info)
    runtimes = openmp_runtimes()
    info.rows.append(("openmp", ", ".join(runtimes) or "not known here"))
    if len(runtimes) > 1:
        info.problems.append(
            f"{len(runtimes)} OpenMP runtimes in one process fight for the cores. Build fastnn against the torch that "
            "runs (pip install --no-build-isolation .) and import torch before packages that bring their own."
        )
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)]
    info.rows.append(("environment", " ".join(variables) or "nothing set that counts"))
    return info


def _version() -> str:
    package = sys.modules.get("fastnn")
    return f"{getattr(package, '__version__', 'unknown')} ({Path(__file__).parent})"


def _torch(info: Info) -> bool:
    try:
        import torch
    except Exception as e:
        info.rows.append(("torch", "does not import"))
        info.problems.append(f"torch does not import ({type(e).__name__}: {e}). Install torch >= 2.11.")
        return False
    release = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    info.rows += [
        ("torch", f"{torch.__version__}, its CPU kernels use {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"),
    ]
    if release < (2, 11):
        info.problems.append(
            f"torch {torch.__version__} is older than 2.11. Install torch >= 2.11 and build fastnn again."
        )
    return True


def _extension(info: Info) -> None:
    try:
        from fastnn import _fallback
        from fastnn._library import _C
    except ImportError as e:
        info.rows.append(("extension", "does not load"))
        info.problems.append(str(e))
        return
    chosen, available = _C.cpu_isa(), _C.cpu_isas()
    info.rows += [
        ("extension", _C.__file__),
        ("kernels", f"{chosen}, of {', '.join(available)} that this CPU has (FASTNN_CPU_ISA chooses)"),
        ("cuda", f"kernels of {', '.join(_C.cuda_ops)}" if _C.cuda_ops else "not built: tensors on a GPU go to torch"),
        ("fallback", _modes(_fallback)),
    ]
    asked = os.environ.get("FASTNN_CPU_ISA")
    if asked and asked not in available:
        info.problems.append(
            f"FASTNN_CPU_ISA={asked} names no ISA that this CPU has. "
            f"Set it to one of {', '.join(available)}, or unset it."
        )
    elif chosen == "baseline" and len(available) == 1 and platform.machine() in ("x86_64", "AMD64"):
        info.problems.append(
            "This CPU has no AVX2 with FMA: the baseline kernels are several times slower than its torch's."
        )


def _modes(fallback) -> str:
    served = sum(fallback.calls.values())
    return f"{fallback.get_fallback()!r}, {served} calls so far without a kernel"


def main() -> int:
    """Print what :func:`collect` finds; return 1 if something is wrong."""
    info = collect()
    print(info)
    return 1 if info.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

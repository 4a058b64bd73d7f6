"""The floor of a problem: what this machine could do at best, probed before the table is printed."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fastnn import _C


class Machine:
    """Peak and bandwidth of this machine at one number of threads.

    Attributes:
        name: the processor.
        flops: floating-point operations per second of FMAs in registers, in the type that sums are kept in.
        bandwidth: bytes per second read from memory, in order.
        cache: bytes of the last cache; what is smaller stays there between the calls of a benchmark.
    """

    def __init__(self, dtype: torch.dtype, threads: int):
        self.name, self.cache = processor(), last_cache()
        self.flops = _C.probe_fma(dtype == torch.float64, threads)
        self.bandwidth = _C.probe_bandwidth(256 << 20, threads)

    def floor(self, flops: float, moved: float) -> float:
        """Return the seconds below which no direct algorithm can come: the larger of arithmetic and memory traffic."""
        return max(flops / self.flops, moved / self.bandwidth if moved > self.cache else 0.0)


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_cache() -> int:
    """Return the size of the last cache in bytes; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes) or 32 << 20

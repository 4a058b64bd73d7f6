"""The floor of a problem: what this machine could do at best, probed before the table is printed; and who else used it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastnn import _C


class Machine:
    """Peak and bandwidth of this machine at one number of threads.

    Attributes:
        name: the processor.
        flops: floating-point operations per second of FMAs in registers, in the type that sums are kept in.
        bandwidth: bytes per second read from memory, in a few long streams a thread.
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


class Others:
    """How many cores other processes (and, on a virtual machine, other machines) took while this was watched.

    Args:
        children: ids of processes that belong to the benchmark, told at each reading.
    """

    def __init__(self, children: Callable[[], Iterable[int]] = tuple):
        self._children = children
        self._before = self._read()

    def _read(self) -> tuple[float, float]:
        """Return the seconds now, and those of CPU time that others have had."""
        tick = os.sysconf("SC_CLK_TCK")
        own = sum(os.times()[:2])
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            for child in self._children():
                fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
                own += (int(fields[11]) + int(fields[12])) / tick
        except (OSError, ValueError):
            return time.monotonic(), 0.0
        return time.monotonic(), (user + nice + system + irq + softirq + steal) / tick - own

    def cores(self) -> float:
        """Return the cores taken since the last reading."""
        then, now = self._before, self._read()
        self._before = now
        return max(0.0, (now[1] - then[1]) / max(now[0] - then[0], 1e-3))

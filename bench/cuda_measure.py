"""The clock of the CUDA benchmark: one case, its errors, and the two sides in turn.

A pass is a number of calls over sets of inputs that together are larger than L2, captured in a CUDA graph (where that
fails, called one by one). Each side's pass runs in turn between two events; a time is the median over turns. Before
that, the outputs of a captured pass are filled with NaN, the graph is replayed, and what then lies there is held against
float64: an output that was not written shows.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cuda_problem import DTYPES, TOLERANCE, Arms, Case, Results
from bench.measure import error, percentiles

MOST_SETS = 32
PASS = 5e-4  # seconds that a pass shall take at least
TURN, ROUNDS, LONGEST = 5e-3, 21, 1.0  # seconds of a turn, turns of a side, seconds of all of them
SLOW = 0.02  # seconds of a call that is not run more often than it must
CLOSE = 1.15  # a peer within this of the fastest one takes turns too
REST = 60.0  # seconds after which the machine's ceilings are measured again


@dataclass
class Recorded:
    """A pass that can be run again: how, and the results of its first call, which each run writes anew if captured."""

    run: Callable[[], object]
    results: Results
    how: str


class Host:
    """The same on the CPU, with no graph: for tests of the method."""

    device = "cpu"

    def __init__(self):
        self.name, self.cache, self.facts = "cpu", 1 << 20, {}

    def scope(self):
        return nullcontext()

    def sync(self) -> None:
        pass

    def room(self) -> int:
        return 1 << 28

    def record(self, calls: list[Callable[[], Results]], repeats: int) -> Recorded:
        def run():
            for _ in range(repeats):
                for call in calls:
                    call()

        return Recorded(run, calls[0](), "loop")

    def seconds(self, run: Callable[[], object], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count

    def free(self) -> None:
        pass


class Gpu(Host):
    """The current GPU. Everything runs on one stream of its own, so that any of it may be captured."""

    device = "cuda"

    def __init__(self):
        properties = torch.cuda.get_device_properties(0)
        self.name, self.cache = properties.name, getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.stream = torch.cuda.Stream()
        self.facts = {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cache": self.cache,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }

    def scope(self):
        return torch.cuda.stream(self.stream)

    def sync(self) -> None:
        torch.cuda.synchronize()

    def room(self) -> int:
        return torch.cuda.mem_get_info()[0] // 4

    def record(self, calls, repeats):
        start = time.perf_counter()
        for call in calls:  # libraries choose their kernels, autograd and the allocator find what they need
            call()
        self.sync()
        if time.perf_counter() - start < SLOW * len(calls):
            for call in calls:
                call()
            self.sync()
        graph, kept = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(repeats):
                    for call in calls:
                        found = call()
                        if not kept:  # memory of a result that is kept is given to no later call
                            kept.extend(found)
                        del found
        except Exception as failure:
            self.sync()  # raises where the device itself is lost
            recorded = Host.record(self, calls, repeats)
            recorded.how = f"loop: {line(failure)}"
            return recorded
        return Recorded(graph.replay, kept, "graph")

    def seconds(self, run, count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def free(self) -> None:
        torch.cuda.empty_cache()


def driver() -> str:
    """Return the driver's version as the system tells it, and the CUDA version that it serves."""
    told = []
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        told.append(next(word for word in words if word[0].isdigit() and word.count(".") >= 1))
    except (OSError, StopIteration, IndexError):
        pass
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            told.append(f"CUDA {version.value // 1000}.{version.value % 1000 // 10}")
    except (OSError, AttributeError):
        pass
    return ", ".join(told) or "unknown"


def line(failure: BaseException) -> str:
    """Return an exception as one line."""
    text = next((part.strip() for part in str(failure).splitlines() if part.strip()), "")
    return f"{type(failure).__name__}: {text}"[:300]


@contextmanager
def precision(dtype: str):
    """Let float32 products round to TF32, for that dtype alone."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Ceilings:
    """What this machine reached now: a copy in memory, bytes read and written, and torch's matrix products."""

    def __init__(self, machine, small: bool = False):
        self._machine, self._small = machine, small
        self._products: dict[str, tuple[float, float]] = {}
        self._copy: tuple[float, float] = (-math.inf, 0.0)

    def _old(self, then: float) -> bool:
        return time.monotonic() - then > REST

    def copy(self) -> float:
        """Return the bytes per second of a large copy."""
        if self._old(self._copy[0]):
            size = 1 << 22 if self._small else min(1 << 31, self._machine.room() // 2)
            source = torch.empty(size, dtype=torch.uint8, device=self._machine.device).random_(256)
            target = torch.empty_like(source)
            self._copy = (time.monotonic(), 2 * size / self._best(lambda: target.copy_(source)))
        return self._copy[1]

    def product(self, dtype: str) -> float:
        """Return the operations per second of a square product: of 8192, where that takes a millisecond or so."""
        then, found = self._products.get(dtype, (-math.inf, 0.0))
        if self._old(then):
            size = 128 if self._small else 8192 if dtype in ("bfloat16", "float16") else 4096
            a, b = (torch.randn(size, size, device=self._machine.device).to(DTYPES[dtype]) for _ in range(2))
            out = torch.empty_like(a)
            with precision(dtype):
                found = 2.0 * size**3 / self._best(lambda: torch.mm(a, b, out=out))
            self._products[dtype] = (time.monotonic(), found)
        return found

    def _best(self, call) -> float:
        self._machine.seconds(call, 3)
        times = sorted(self._machine.seconds(call, 5) for _ in range(5))
        self._machine.free()
        return times[len(times) // 2]


def bound(arms: Arms, function, sets) -> list[Callable[[], Results]]:
    """The calls of a pass: a function on each set of inputs."""
    if arms.prepare:
        return [arms.prepare(function, tensors) for tensors in sets]
    return [lambda tensors=tensors: function(*tensors) for tensors in sets]


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Measure:
    """Cases on one machine.

    Args:
        machine: :class:`Gpu`, or :class:`Host` in tests.
        quick: fewer turns.
    """

    def __init__(self, machine, quick: bool = False, small: bool = False):
        self.machine, self.quick = machine, quick
        self.ceilings = Ceilings(machine, small)

    def row(self, case: Case) -> dict:
        """Measure a case. What raises on fastnn's side, or on all of torch's, becomes the row's ``failed``."""
        row = {
            "family": case.family, "id": case.id, "shape": case.shape, "dtype": case.dtype, "direction": case.direction,
            "machine": self.machine.name, "torch": torch.__version__, **self.machine.facts,
            "flops": case.flops, "bytes": case.moved, "note": case.note,
        }  # fmt: skip
        start = time.monotonic()
        try:
            with self.machine.scope(), precision(case.dtype):
                row |= self._measured(case)
        except Exception as failure:
            row["failed"] = line(failure)
        row["took"] = round(time.monotonic() - start, 2)
        try:
            self.machine.sync()
            self.machine.free()
        except Exception as failure:  # an error that stays: nothing more can be run in this process
            row["lost"] = line(failure)
            row.setdefault("failed", row["lost"])
        return row

    def _measured(self, case: Case) -> dict:
        copy, peak = self.ceilings.copy(), self.ceilings.product(case.dtype)
        found = {"bandwidth": copy, "peak": peak, "gemm": self.ceilings.product("bfloat16")}
        torch.manual_seed(len(case.id) + int(case.flops) % 1000)
        arms = case.build(self.machine.device)
        first = arms.draw()
        need = math.ceil(3 * self.machine.cache / max(1, bytes_of(first)))
        most = max(1, self.machine.room() // max(1, bytes_of(first)))
        sets = [first, *(arms.draw() for _ in range(min(max(2, need), MOST_SETS, most) - 1))]
        if len(sets) * bytes_of(first) < 2 * self.machine.cache:
            found["note"] = f"{case.note}; inputs stay in L2".removeprefix("; ")

        calls = bound(arms, arms.own, sets)
        one = calls[0]()
        self.machine.sync()
        if case.direction != "forward":
            again = calls[0]()
            found["deterministic"] = all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        del one
        took = max(self.machine.seconds(calls[-1], 3), 1e-7)
        repeats = max(1, min(1000, math.ceil(PASS / took / len(sets))))
        found |= {"sets": len(sets), "calls": repeats * len(sets)}

        passes = {"fastnn": self.machine.record(calls, repeats)}
        found["errors"] = {"fastnn": self._error(arms, first, passes["fastnn"])}
        found["refused"], alone, wrong = {}, {}, {}
        for name, function in arms.peers.items():
            if name.partition(", ")[0] in alone:  # another way to call one that has been measured
                continue
            try:
                pass_ = self.machine.record(bound(arms, function, sets), repeats)
                wrong[name] = self._error(arms, first, pass_)
                alone[name] = sorted(self.machine.seconds(pass_.run, 1) for _ in range(3))[1] / found["calls"]
                passes[name] = pass_
            except Exception as failure:
                self.machine.sync()
                found["refused"][name] = line(failure)
            for other in [other for other in alone if other in passes and alone[other] > CLOSE * min(alone.values())]:
                del passes[other]  # its graph holds memory, and its turns would take time
        if not alone:
            raise RuntimeError(f"none of torch's ways runs: {found['refused']}")
        times = self._turns(passes)
        best = min((name for name in times if name != "fastnn"), key=lambda name: times[name]["p50"])
        for told in times.values():
            told |= {key: told[key] / found["calls"] for key in ("p20", "p50", "p80")}
        found["times"] = {"fastnn": times["fastnn"], "torch": times[best]}
        found["errors"]["torch"] = wrong[best]
        found |= {"best": best, "peers": alone, "how": {"fastnn": passes["fastnn"].how, "torch": passes[best].how}}
        found["floor"] = max(case.flops / peak, case.moved / copy)
        found["wrong"] = not found["errors"]["fastnn"] <= max(TOLERANCE[case.dtype], 2 * wrong[best])
        return found

    def _turns(self, passes: dict[str, Recorded]) -> dict[str, dict[str, float]]:
        """Let the passes run in turn and return the percentiles of the seconds of one, and the ratios to fastnn's."""
        one = {name: max(self.machine.seconds(pass_.run, 1), 1e-7) for name, pass_ in passes.items()}
        counts = {name: max(1, round(TURN / seconds)) for name, seconds in one.items()}
        whole = sum(counts[name] * one[name] for name in passes)
        rounds = max(3, min(ROUNDS, int(LONGEST / whole))) // (2 if self.quick else 1)
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for round_ in range(max(2, rounds)):
            for name in list(passes) if round_ % 2 else reversed(list(passes)):
                seconds[name].append(self.machine.seconds(passes[name].run, counts[name]))
        return {name: percentiles(values, seconds, "fastnn") for name, values in seconds.items()}

    def _error(self, arms: Arms, tensors, pass_: Recorded) -> float:
        """Poison the results of a captured pass, run it, and tell the error of what it wrote."""
        if pass_.how == "graph":
            for result in pass_.results:
                result.fill_(math.nan)
            pass_.run()
        self.machine.sync()
        return error(*zip(*arms.check(tensors, pass_.results), strict=True))


def kernels(case: Case, machine) -> list[str]:
    """Return the names of the kernels that fastnn's side of a case ran, as torch's profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    with machine.scope(), precision(case.dtype):
        arms = case.build(machine.device)
        (call,) = bound(arms, arms.own, [arms.draw()])
        call()
        machine.sync()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            machine.sync()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return list(dict.fromkeys(name for name in names if not name.startswith(("Memcpy", "Memset"))))

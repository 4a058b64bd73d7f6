"""One row: build a problem, tell the error of each provider, let the providers take turns on it."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import torch

from bench import memory, peer
from bench.peak import Machine, Others
from bench.problem import Built, Problem
from fastnn.testing import max_error


class Setting(NamedTuple):
    """What the rows of one table share."""

    family: str
    dtype: str
    direction: str
    threads: int
    machine: Machine

    @property
    def training(self) -> bool:
        return self.direction == "training"


class Bench:
    """What a run keeps from row to row: the processes of its peers, and the float64 results of its problems.

    Args:
        options: the arguments of bench/run.py.
    """

    def __init__(self, options):
        self.options = options
        self._peers: dict[str, peer.Peer] = {}
        self._exact: dict[tuple, list[torch.Tensor]] = {}
        self._others = Others(lambda: [child.id for child in self._peers.values()])

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception) -> None:
        for child in self._peers.values():
            child.close()

    def peers(self, setting: Setting) -> list[str]:
        """Return the names of the peers beside torch eager in this setting; ONNX models have the forward in float32."""
        if self.options.own_float32:
            return []
        onnx = setting.dtype == "float32" and not setting.training and not self.options.no_onnx
        runtimes = [name for name in peer.RUNTIMES if onnx and peer.available(name)]
        return ["compile"] * self.options.compile + runtimes

    def measure(self, problem: Problem, setting: Setting) -> dict:
        """Run one problem with every provider and return its row."""
        dtype, training = getattr(torch, setting.dtype), setting.training
        built = problem.build(dtype)
        tensors, wanted = leaves(built, training)
        functions = {"fastnn": (built.fastnn, tensors)}
        if built.frozen and not training:
            functions["frozen"] = (built.frozen(), tensors[: built.inputs])
        if not self.options.own_float32:
            functions["torch"] = (built.torch, tensors)
        exact = self.exact(problem, setting, built, tensors, wanted)
        errors, extra = {}, {}
        for name, (function, arguments) in functions.items():
            found = results(function, arguments, wanted, training)
            errors[name] = error(found, exact)
            extra[name] = memory.extra(partial(results, function, arguments, wanted, training, cotangent(found[0])))
        if self.options.own_float32:
            functions |= in_float32(problem, training)
        providers = {name: calls(*function, training) for name, function in functions.items()}
        note = problem.note
        for name in self.peers(setting):
            if not (built.compiles if name == "compile" else built.onnx):
                continue
            child = self._peers.get(name) or self._peers.setdefault(name, peer.Peer(name))
            try:
                if name == "compile":
                    child.load(setting.family, problem.id, setting.dtype, training, setting.threads)
                else:
                    child.load(*built.onnx(), setting.threads)
                theirs = [torch.from_numpy(a).reshape(b.shape) for a, b in zip(child.results(), exact, strict=True)]
            except RuntimeError as failure:  # the others' times still stand
                note = f"{note}; {str(failure).splitlines()[0]}".removeprefix("; ")
                self._peers.pop(name).close()  # it may be gone, or in a state of its own: the next problem has another
                continue
            errors[name] = error(theirs, exact)
            providers[name] = child.turn
        self._others.cores()
        times = take_turns(providers, self.options.quick)
        others = self._others.cores()

        flops = problem.flops * (3 if training else 1)
        moved = problem.elements * (3 if training else 1) * dtype.itemsize
        floor = setting.machine.floor(flops, moved)
        best = times["fastnn"]["p50"]
        row = {"family": setting.family, "id": problem.id, "shape": problem.shape, "group": problem.group,
               "dtype": setting.dtype, "direction": setting.direction, "threads": setting.threads,
               "machine": setting.machine.name, "torch": torch.__version__, "times": times, "errors": errors,
               "extra": extra, "flops": flops, "bytes": moved, "peak": setting.machine.flops,
               "bandwidth": setting.machine.bandwidth, "gflops": flops / best / 1e9, "floor": best / floor,
               "others": others, "note": note}  # fmt: skip
        return row | {package: version(package) for name, package in peer.RUNTIMES.items() if name in times}

    def exact(self, problem: Problem, setting: Setting, built: Built, tensors, wanted) -> list[torch.Tensor]:
        """Return the float64 results, computed once for all numbers of threads."""
        key = (setting.family, problem.id, setting.dtype, setting.direction)
        if key not in self._exact:
            self._exact[key] = oracle(built, tensors, wanted, setting.training)
        return self._exact[key]


def leaves(built: Built, training: bool) -> tuple[tuple, list[int]]:
    """Return a problem's tensors, in training as leaves that want gradients, and the positions of those."""
    wanted = [i for i, t in enumerate(built.tensors) if wants_gradient(t) and i not in built.constant]
    tensors = tuple(None if t is None else t.detach().requires_grad_(training and i in wanted)
                    for i, t in enumerate(built.tensors))  # fmt: skip
    return tensors, wanted


def wants_gradient(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def in_float32(problem: Problem, training: bool) -> dict:
    """Return fastnn's own providers on the same problem in float32."""
    built = problem.build(torch.float32)
    tensors, _ = leaves(built, training)
    functions = {"float32": (built.fastnn, tensors)}
    if built.frozen and not training:
        functions["frozen32"] = (built.frozen(), tensors[: built.inputs])
    return functions


def first(output):
    """Return the first element of a tuple, or what is no tuple as it is."""
    return output[0] if isinstance(output, tuple) else output


def parameters(function) -> list[torch.Tensor]:
    return list(function.parameters()) if isinstance(function, torch.nn.Module) else []


def cotangent(output: torch.Tensor) -> torch.Tensor:
    """Return the same random numbers for each output of a shape."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)


def results(function, tensors, wanted, training, against: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the output, and in training the gradients of its product with ``against``: else, with its cotangent."""
    if not training:
        with torch.no_grad():
            return [first(function(*tensors))]
    output = first(function(*tensors))
    sources = [tensors[i] for i in wanted] + parameters(function)
    against = cotangent(output) if against is None else against
    gradients = torch.autograd.grad(output, sources, against, allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def oracle(built: Built, tensors, wanted, training) -> list[torch.Tensor]:
    """Return the results of torch in float64."""
    function = copy.deepcopy(built.torch).double() if isinstance(built.torch, torch.nn.Module) else built.torch
    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) if wants_gradient(t) else t for t in tensors)
    return results(function, exact, wanted, training)


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the largest error of the output and the gradients, each as a share of its largest value; NaN where one is."""
    return torch.tensor([max_error(a, b) for a, b in zip(found, exact, strict=True)]).max().item()


def calls(function, tensors, training):
    """Return a function that runs a provider so many times and returns the seconds of one."""
    if training:
        sources = [t for t in tensors if t is not None and t.requires_grad] + parameters(function)
        cotangent = torch.randn_like(first(function(*tensors)))

    def step():
        torch.autograd.grad(first(function(*tensors)), sources, cotangent, allow_unused=True)

    call = step if training else partial(function, *tensors)

    def turn(count: int) -> float:
        with torch.set_grad_enabled(training):
            return peer.timed(call, count)

    return turn


def take_turns(providers: dict, quick: bool, base: str = "fastnn") -> dict[str, dict[str, float]]:
    """Let every provider run in turn, many times, and return the percentiles of the seconds of a call."""
    turn, rounds = (0.004, 11) if quick else (0.01, 21)
    counts = {}
    for name, run in providers.items():
        run(1)  # warm
        one = run(1)
        counts[name] = max(1, min(20000, round(turn / max(one if one > turn else run(3), 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    for round_ in range(rounds):
        for name in order if round_ % 2 else reversed(order):
            seconds[name].append(providers[name](counts[name]))
    return {name: percentiles(values, seconds, base) for name, values in seconds.items()}


def percentiles(values: list[float], seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Return the percentiles of a provider's turns, and the medians of its times over fastnn's, turn by turn."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    told = {"p50": statistics.median(values), "p20": cuts[1], "p80": cuts[7]}
    for name, other in (("ratio", base), ("ratio_frozen", "frozen")):
        if other in seconds:
            told[name] = statistics.median(value / own for value, own in zip(values, seconds[other], strict=True))
    return told

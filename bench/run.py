"""Time fastnn against torch, and against torch.compile and ONNX Runtime where asked for or installed.

    python bench/run.py                                  every family, float32, forward, on one thread and on all
    python bench/run.py --family linear --dtype bfloat16 --direction training --threads 2
    python bench/run.py --only bert --json out.json      problems whose name contains "bert"
    python bench/run.py --compare old.json               beside the figures of an earlier run

The providers take turns on the same tensors in one run; a time is the median over turns, with the 20th and 80th
percentile, and a ratio the median over turns of the other's time over fastnn's. The error is the largest distance from
torch in float64, as a share of the largest value of the result (of each gradient, in training). What is behind torch is
marked.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peer
from bench.peak import Machine
from bench.problem import Built, Problem
from fastnn.testing import max_error

FAMILIES = ("linear", "conv2d", "rnn", "attention")


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the arguments ask for, print the tables, and return their rows."""
    options = parse(argv)
    old = {key(row): row for row in json.loads(Path(options.compare).read_text())} if options.compare else {}
    rows: list[dict] = []
    for family in options.family:
        problems = importlib.import_module(f"bench.{family}").PROBLEMS
        for dtype in options.dtype:
            for direction in options.direction:
                for threads in options.threads:
                    rows += table(family, problems, dtype, direction, threads, options, old)
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)  # a row a line: a run that is kept can be read and diffed
        Path(options.json).write_text(f"[\n{lines}\n]\n")
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = sorted({1, torch.get_num_threads()})
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"])
    parser.add_argument("--direction", nargs="+", choices=["forward", "training"], default=["forward"])
    parser.add_argument("--threads", nargs="+", type=int, default=both)
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (compiles for seconds a row)")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX Runtime out, though it is installed")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--compare", help="a file that --json wrote")
    return parser.parse_args(argv)


def table(family, problems, dtype_name, direction, threads, options, old) -> list[dict]:
    """Run and print one table; return its rows."""
    problems = [p for p in problems if options.only in p.id and direction in p.directions]
    if not problems:
        return []
    dtype = getattr(torch, dtype_name)
    torch.set_num_threads(threads)
    machine = Machine(dtype, threads)
    print(
        f"\n{family}, {dtype_name}, {direction}, {threads} thread{'s' * (threads > 1)} on {machine.name}; torch "
        f"{torch.__version__}; peak {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s"
    )
    header = f"{'problem':26} {'shape':34} {'fastnn µs (p20–p80)':>28} {'torch µs':>10} {'ratio':>6}"
    extra = ["compile"] * options.compile + ["onnx"] * onnx_wanted(dtype_name, direction, options)
    header += "".join(f" {name:>9} {'ratio':>6}" for name in extra)
    print(header + f" {'GFLOP/s':>8} {'×floor':>7} {'error':>8} {'torch’s':>8}")
    rows = []
    for problem in problems:
        row = measure(problem, family, dtype_name, direction, threads, machine, options)
        rows.append(row)
        print(text(row, extra, old.get(key(row))), flush=True)
    print(summary(rows, extra), flush=True)
    return rows


def onnx_wanted(dtype_name: str, direction: str, options) -> bool:
    """Return whether ONNX Runtime can and shall run: it has the forward in float32."""
    return dtype_name == "float32" and direction == "forward" and not options.no_onnx and peer.available()


def measure(problem: Problem, family, dtype_name, direction, threads, machine: Machine, options) -> dict:
    """Run one problem with every provider and return its row."""
    built = problem.build(getattr(torch, dtype_name))
    training = direction == "training"
    wanted = [i for i, t in enumerate(built.tensors) if wants_gradient(t) and i not in built.constant]
    tensors = tuple(t.detach().requires_grad_(training and i in wanted) if t is not None else None
                    for i, t in enumerate(built.tensors))  # fmt: skip
    errors = {
        name: error(f, built, tensors, wanted, training)
        for name, f in (("fastnn", built.fastnn), ("torch", built.torch))
    }

    providers = {"fastnn": calls(built.fastnn, tensors, training), "torch": calls(built.torch, tensors, training)}
    if options.compile:
        torch.compiler.reset()
        providers["compile"] = calls(torch.compile(built.torch, dynamic=False), tensors, training)
    other = None
    if onnx_wanted(dtype_name, direction, options) and built.onnx is not None:
        other = peer.Peer(built.onnx(), threads)
        with torch.no_grad():
            expected = first(built.torch(*tensors))
        errors["onnx"] = max_error(torch.from_numpy(other.output()).reshape(expected.shape), expected.double())
        providers["onnx"] = other.turn
    try:
        times = take_turns(providers, options.quick)
    finally:
        if other:
            other.close()

    flops = problem.flops * (3 if training else 1)
    moved = problem.elements * (3 if training else 1) * getattr(torch, dtype_name).itemsize
    best = times["fastnn"]["p50"]
    row = {"family": family, "id": problem.id, "shape": problem.shape, "dtype": dtype_name, "direction": direction,
           "threads": threads, "machine": machine.name, "torch": torch.__version__, "times": times, "errors": errors,
           "gflops": flops / best / 1e9, "floor": best / machine.floor(flops, moved), "note": problem.note}  # fmt: skip
    return row


def wants_gradient(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def first(output):
    """Return the first element of a tuple, or what is no tuple as it is."""
    return output[0] if isinstance(output, tuple) else output


def parameters(function) -> list[torch.Tensor]:
    return list(function.parameters()) if isinstance(function, torch.nn.Module) else []


def results(function, tensors, wanted, training) -> list[torch.Tensor]:
    """Return the output, and in training the gradients of its product with fixed random numbers."""
    if not training:
        with torch.no_grad():
            return [first(function(*tensors))]
    output = first(function(*tensors))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    sources = [tensors[i] for i in wanted] + parameters(function)
    gradients = torch.autograd.grad(output, sources, cotangent, allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def error(function, built: Built, tensors, wanted, training) -> float:
    """Return the largest error of the output and the gradients against torch in float64."""
    oracle = copy.deepcopy(built.torch).double() if isinstance(built.torch, torch.nn.Module) else built.torch
    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) if wants_gradient(t) else t for t in tensors)
    pairs = zip(results(function, tensors, wanted, training), results(oracle, exact, wanted, training), strict=True)
    return max(max_error(a, b) for a, b in pairs)


def calls(function, tensors, training):
    """Return a function that runs a provider so many times and returns the seconds of one."""
    if training:
        sources = [t for t in tensors if t is not None and t.requires_grad] + parameters(function)
        cotangent = torch.randn_like(first(function(*tensors)))

        def step():
            torch.autograd.grad(first(function(*tensors)), sources, cotangent, allow_unused=True)

    def turn(count: int) -> float:
        if training:
            start = time.perf_counter()
            for _ in range(count):
                step()
            return (time.perf_counter() - start) / count
        with torch.no_grad():
            start = time.perf_counter()
            for _ in range(count):
                function(*tensors)
            return (time.perf_counter() - start) / count

    return turn


def take_turns(providers: dict, quick: bool) -> dict[str, dict[str, float]]:
    """Let every provider run in turn, many times, and return the percentiles of the seconds of a call."""
    turn, rounds = (0.002, 7) if quick else (0.01, 21)
    counts = {}
    for name, run in providers.items():
        run(2)  # warm
        counts[name] = max(1, min(20000, round(turn / max(run(3), 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    for round_ in range(rounds):
        for name in order if round_ % 2 else reversed(order):
            seconds[name].append(providers[name](counts[name]))
    return {name: percentiles(values, seconds["fastnn"]) for name, values in seconds.items()}


def percentiles(values: list[float], own: list[float]) -> dict[str, float]:
    """Return the percentiles of a provider's turns, and the median of its times over fastnn's, turn by turn."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    ratio = statistics.median(value / mine for value, mine in zip(values, own, strict=True))
    return {"p50": statistics.median(values), "p20": cuts[1], "p80": cuts[7], "ratio": ratio}


def text(row: dict, extra: list[str], old: dict | None) -> str:
    """Return the printed line of a row."""
    times, own = row["times"], row["times"]["fastnn"]
    spread = f"{own['p50'] * 1e6:.1f} ({own['p20'] * 1e6:.1f}–{own['p80'] * 1e6:.1f})"
    line = (
        f"{row['id']:26} {row['shape']:34} {spread:>28} {times['torch']['p50'] * 1e6:10.1f} {ratio(row, 'torch'):6.2f}"
    )
    for name in extra:
        line += f" {times[name]['p50'] * 1e6:9.1f} {ratio(row, name):6.2f}" if name in times else f" {'–':>9} {'–':>6}"
    line += f" {row['gflops']:8.1f} {row['floor']:7.1f} {row['errors']['fastnn']:8.1e} {row['errors']['torch']:8.1e}"
    if old:
        line += f"  was {ratio(old, 'torch'):.2f}×, now {ratio(row, 'torch') / ratio(old, 'torch'):.2f} of it"
    return line + ("  < torch" if ratio(row, "torch") < 1 else "") + (f"  ({row['note']})" if row["note"] else "")


def ratio(row: dict, name: str) -> float:
    """Return how many times as long as fastnn another provider takes."""
    return row["times"][name]["ratio"]


def summary(rows: list[dict], extra: list[str]) -> str:
    """Return the geometric means of a table, and what is behind torch."""
    lines = []
    for name in ["torch", *extra]:
        ratios = [ratio(row, name) for row in rows if name in row["times"]]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(f"{mean:.2f}× {name} ({min(ratios):.2f}–{max(ratios):.2f}, {len(ratios)} problems)")
    behind = [f"{row['id']} {ratio(row, 'torch'):.2f}" for row in rows if ratio(row, "torch") < 1]
    floors = math.exp(sum(math.log(row["floor"]) for row in rows) / len(rows))
    told = f"; behind torch: {', '.join(behind)}" if behind else "; nothing behind torch"
    return f"geometric mean: {', '.join(lines)}; {floors:.1f}× the floor{told}"


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("family", "id", "dtype", "direction", "threads"))


if __name__ == "__main__":
    main()

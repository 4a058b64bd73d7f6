"""Time fastnn against torch, and against torch.compile, ONNX Runtime and OpenVINO where asked for or installed.

    python bench/run.py                                  every family, float32, forward, on one thread and on all
    python bench/run.py --family linear --dtype bfloat16 --direction training --threads 2
    python bench/run.py --only bert vit --json out.json  problems with "bert" or "vit" in their name
    python bench/run.py --compare old.json               beside the figures of an earlier run
    python bench/run.py --dtype bfloat16 --own-float32   beside fastnn's own float32, the two in turn
    python bench/run.py --family conv2d --variants       each algorithm beside the one that is picked
    python bench/run.py --show out.json --plot out.png   the tables and the roofline of a kept run

The providers take turns on the same tensors in one run; a time is the median over turns, with the 20th and 80th
percentile, and a ratio the median over turns of the other's time over fastnn's. The error is the largest distance from
torch in float64, as a share of the largest value of the result (of each gradient, in training). What is behind torch or
the best peer is marked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import plot, variants
from bench.measure import Bench, Setting
from bench.peak import Machine
from bench.problem import Problem
from bench.table import Table, key, show

FAMILIES = ("linear", "conv2d", "rnn", "attention")


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the arguments ask for, print the tables, and return their rows."""
    options = parse(argv)
    if options.plot:
        plot.check()
    if options.show:
        rows = [row for file in options.show for row in json.loads(Path(file).read_text())]
        show(rows)
    else:
        rows = run(options)
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)  # a row a line: a run that is kept can be read and diffed
        Path(options.json).write_text(f"[\n{lines}\n]\n")
    if options.plot:
        plot.roofline(rows, options.plot)
    return rows


def run(options: argparse.Namespace) -> list[dict]:
    """Measure table after table."""
    old = {key(row): row for row in json.loads(Path(options.compare).read_text())} if options.compare else {}
    rows: list[dict] = []
    with Bench(options) as bench:
        for family in options.family:
            problems = [p for p in importlib.import_module(f"bench.{family}").PROBLEMS if chosen(p, options)]
            part, parts = options.part
            problems = problems[part - 1 :: parts]
            for dtype in options.dtype:
                for direction in options.direction:
                    able = [p for p in problems if direction in p.directions]
                    for threads in options.threads if able else ():
                        torch.set_num_threads(threads)
                        if options.variants:
                            rows += variants.table(family, able, dtype, direction, threads, options.quick)
                        else:
                            setting = Setting(
                                family, dtype, direction, threads, Machine(getattr(torch, dtype), threads)
                            )
                            rows += table(able, setting, bench, old)
    return rows


def chosen(problem: Problem, options: argparse.Namespace) -> bool:
    return not options.only or any(re.search(pattern, problem.id) for pattern in options.only)


def table(problems: list[Problem], setting: Setting, bench: Bench, old: dict) -> list[dict]:
    """Measure and print one table; return its rows."""
    start, rows = time.monotonic(), []
    for i, problem in enumerate(problems):
        row = bench.measure(problem, setting)
        if not rows:  # the first row tells whether there is a frozen module
            names = ["fastnn", "frozen"] if "frozen" in row["times"] else ["fastnn"]
            names += [name for name in ("torch", "float32", "frozen32") if name in row["times"]]
            printed = Table([*names, *bench.peers(setting)])
            print(printed.head(row))
        rows.append(row)
        print(printed.line(row, old.get(key(row))), flush=True)
        if sys.stderr.isatty():
            print(f"{i + 1} of {len(problems)}, {time.monotonic() - start:.0f} s", end="\r", file=sys.stderr)
    print(f"{printed.summary(rows)}\n{len(rows)} problems in {time.monotonic() - start:.0f} s", flush=True)
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
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="REGEX", help="problems whose name matches one of these"
    )
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="every N-th problem, from the I-th on")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (compiles for seconds a row)")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX Runtime and OpenVINO out")
    parser.add_argument("--own-float32", action="store_true", help="time fastnn in float32 in place of the peers")
    parser.add_argument("--variants", action="store_true", help="time each algorithm in place of the peers")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--compare", help="a file that --json wrote")
    parser.add_argument("--show", nargs="+", metavar="JSON", help="print the tables of kept runs; nothing is measured")
    parser.add_argument("--plot", metavar="PNG", help="draw the roofline to this file (needs matplotlib)")
    options = parser.parse_args(argv)
    if options.variants and options.plot:
        parser.error("--plot draws peers, and --variants has none.")
    return options


def part(text: str) -> tuple[int, int]:
    """Read ``I/N``."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return i, n


if __name__ == "__main__":
    main()

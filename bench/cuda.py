"""Time fastnn's CUDA kernels against torch's on a GPU; the method is in bench/cuda_measure.py and results/BENCH.md.

    python bench/cuda.py --json cuda.json              every case, the goals' first, as many as fit into --budget seconds
    python bench/cuda.py --json cuda.json --resume     what the file has not yet: after a crash, or with more time
    python bench/cuda.py --only thin decode            cases with "thin" or "decode" in "family id dtype direction"
    python bench/cuda.py --show cuda.json              the tables and the goals of a kept run; needs no GPU
    python bench/cuda.py --list                        the cases

The file is written after each case, and says before one that it is running: what ends the process loses that one alone.
Exit status: 0 all is well; 1 some case failed or is wrong; 3 the device is lost to this process, --resume goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose cuda.py would stand before the package of that name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import cuda_table

FAMILIES = ("linear", "attention")
KERNELS = 10.0  # seconds kept for the names of the kernels that ran
LOST = 3


def main(argv: list[str] | None = None, measure=None) -> int:
    """Run what the arguments ask for; ``measure`` takes the place of the GPU in tests."""
    options = parse(argv)
    if options.show:
        print(cuda_table.tables(json.loads(Path(options.show).read_text())), flush=True)
        return 0
    cases = chosen(options)
    if options.list:
        print("\n".join(" ".join(case.key) + "  " + case.shape for case in cases))
        return 0
    if measure is None:
        measure = on_gpu(options)
    rows = kept(options.json) if options.resume else []
    alive = run(cases, rows, measure, options)
    print("\n" + cuda_table.tables(rows), flush=True)
    if not alive:
        return LOST
    return int(not all(map(cuda_table.right, rows)))


def chosen(options: argparse.Namespace) -> list:
    """Return the cases asked for: those of the goals first, the families side by side."""
    placed = []
    for family in options.family:
        cases = importlib.import_module(f"bench.cuda_{family}").CASES
        for first in (True, False):
            members = [case for case in cases if case.first == first]
            placed += [((not first, i / len(members)), case) for i, case in enumerate(members)]
    return [
        case
        for _, case in sorted(placed, key=lambda pair: pair[0])
        if (not options.dtype or case.dtype in options.dtype)
        and (not options.only or any(re.search(pattern, " ".join(case.key)) for pattern in options.only))
    ]


def on_gpu(options: argparse.Namespace):
    """Return the measure on the current GPU, or say in a sentence why there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench/cuda.py: needs a GPU, and torch sees none here. --list and --show need none.")
    import fastnn
    from bench.cuda_measure import Gpu, Measure

    fastnn.set_fallback("error")  # torch must not stand on both sides
    return Measure(Gpu(), options.quick)


def run(cases: list, rows: list[dict], measure, options: argparse.Namespace) -> bool:
    """Measure what ``rows`` has not; add to it, write it, and print each row, while there is time.

    Returns:
        Whether the device is still of use to this process.
    """
    start, done = time.monotonic(), {cuda_table.key(row) for row in rows}
    reserve = 0.0 if options.no_kernels else min(KERNELS, options.budget / 5)
    print(cuda_table.HEAD, flush=True)
    left = [case for case in cases if case.key not in done]
    for i, case in enumerate(left):
        if time.monotonic() - start > options.budget - reserve:
            print(f"the time is up: {len(left) - i} of {len(left)} cases were not run", flush=True)
            break
        names = dict(zip(("family", "id", "dtype", "direction"), case.key, strict=True))
        told = {"machine": measure.machine.name, "torch": "", "shape": case.shape}
        rows.append({**names, **told, "running": True})
        write(rows, options.json)
        rows[-1] = measure.row(case)
        write(rows, options.json)
        print(f"{case.family} {case.direction}: {cuda_table.line(rows[-1])}", flush=True)
        if "lost" in rows[-1]:
            print("the device is lost to this process; --resume goes on in another", flush=True)
            return False
    if not options.no_kernels:
        name_kernels(cases, rows, measure.machine, start + options.budget)
        write(rows, options.json)
    return True


def name_kernels(cases: list, rows: list[dict], machine, until: float) -> None:
    """Add the names of the kernels that served, last of all: a profiler may leave traces in what is timed after it."""
    from bench.cuda_measure import kernels, line

    found = {cuda_table.key(row): row for row in rows if cuda_table.measured(row) and "kernels" not in row}
    for case in cases:
        if case.key in found and time.monotonic() < until:
            try:
                found[case.key]["kernels"] = kernels(case, machine)
                machine.free()
            except Exception as failure:
                print(f"the kernels' names are not known: {line(failure)}", flush=True)
                return


def kept(path: str) -> list[dict]:
    """Return the rows of a file. The one that was running when its process ended has failed."""
    rows = json.loads(Path(path).read_text()) if path and Path(path).exists() else []
    for row in rows:
        if row.pop("running", False):
            row["failed"] = "its process crashed or was ended"
    return rows


def write(rows: list[dict], path: str | None) -> None:
    if path:
        new = Path(f"{path}.new")
        new.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        os.replace(new, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32", "tf32", "float64"])
    parser.add_argument("--only", nargs="+", default=[], metavar="REGEX", help='of "family id dtype direction"')
    parser.add_argument("--budget", type=float, default=150.0, metavar="SECONDS", help="no case is begun after this")
    parser.add_argument("--json", help="write the rows to this file, after each case")
    parser.add_argument("--resume", action="store_true", help="keep the file's rows and run what it has not")
    parser.add_argument("--quick", action="store_true", help="half as many turns")
    parser.add_argument("--no-kernels", action="store_true", help="do not ask torch's profiler which kernels ran")
    parser.add_argument("--show", metavar="JSON", help="print the tables of a kept run; nothing is measured")
    parser.add_argument("--list", action="store_true", help="print the cases; nothing is measured")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

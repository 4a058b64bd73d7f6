"""Was the pick right? Each algorithm that can serve a problem, forced, beside the one that the op picks itself.

An op takes part if ``fastnn.testing.ALGORITHMS`` has it. An algorithm that cannot serve a problem raises, or the op tells
that another one runs (``Built.algorithm``): it is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.measure import calls, leaves, take_turns
from bench.problem import Problem
from fastnn import testing

NEAR = 1.05  # a pick this close to the best is as good
HOPELESS = 5  # not timed in turn: one call of it already says enough


def table(family: str, problems: list[Problem], dtype: str, direction: str, threads: int, quick: bool) -> list[dict]:
    """Measure and print; a row for each problem, plain and frozen, that two or more algorithms can serve."""
    names = testing.ALGORITHMS.get(family, ())
    if not names:
        print(f"\n{family}: its algorithms cannot be forced.")
        return []
    print(
        f"\n{family}, {dtype}, {direction}, {threads} thread{'s' * (threads > 1)}: µs of the pick and of each algorithm"
    )
    print(f"{'problem':28} {'weights':8} {'pick':>10} {'µs':>10}" + "".join(f" {name:>12}" for name in names))
    rows = []
    for problem in problems:
        for frozen in (False, True):
            row = measure(family, problem, dtype, direction, threads, frozen, quick)
            if row:
                rows.append(row)
                print(line(row, names), flush=True)
    wrong = [f"{row['id']} ({row['weights']}) {row['over']:.2f}" for row in rows if row["over"] > NEAR]
    print(f"{len(rows) - len(wrong)} of {len(rows)} picks within 5 % of the best"
          + (f"; not: {', '.join(wrong)}" if wrong else ""))  # fmt: skip
    return rows


def measure(family, problem: Problem, dtype, direction, threads, frozen: bool, quick: bool) -> dict | None:
    """Return a row, or None where fewer than two algorithms can serve."""
    training = direction == "training"
    built = problem.build(getattr(torch, dtype))
    if frozen and (training or built.frozen is None):
        return None
    tensors, _ = leaves(built, training)

    def provider() -> Callable[[int], float]:  # a frozen module packs at its first call, for the algorithm it runs then
        function, arguments = (built.frozen(), tensors[: built.inputs]) if frozen else (built.fastnn, tensors)
        return calls(function, arguments, training)

    providers, hopeless = {"pick": provider()}, {}
    providers["pick"](1)
    usual = min(providers["pick"](1) for _ in range(2))
    for name in testing.ALGORITHMS[family]:
        try:
            with testing.forced(family, name):
                if built.algorithm and built.algorithm(frozen) != name:
                    continue
                run = provider()
                run(1)
                one = run(1)
        except (RuntimeError, ValueError):
            continue
        if one > HOPELESS * usual:
            hopeless[name] = one
        else:
            providers[name] = under(family, name, run)
    if len(providers) + len(hopeless) < 3:
        return None
    turns = take_turns(providers, quick, base="pick")
    times = {name: told["p50"] for name, told in turns.items()}
    pick = built.algorithm(frozen) if built.algorithm else ""
    others = [name for name in turns if name not in ("pick", pick)]  # itself, forced, differs from it by noise alone
    best = min(others, key=lambda name: turns[name]["ratio"], default=pick)
    over = max(1.0, 1 / turns[best]["ratio"]) if others else 1.0
    return {"family": family, "id": problem.id, "dtype": dtype, "direction": direction, "threads": threads,
            "weights": "frozen" if frozen else "plain", "pick": pick, "times": times, "hopeless": hopeless,
            "best": best if over > 1 else "pick", "over": over}  # fmt: skip


def under(family: str, name: str, run: Callable[[int], float]) -> Callable[[int], float]:
    def turn(count: int) -> float:
        with testing.forced(family, name):
            return run(count)

    return turn


def line(row: dict, names: tuple[str, ...]) -> str:
    """Return the printed line of a row."""
    line = f"{row['id']:28} {row['weights']:8} {row['pick']:>10} {row['times']['pick'] * 1e6:10.1f}"
    for name in names:
        if name in row["times"]:
            line += f" {row['times'][name] * 1e6:12.1f}"
        elif name in row["hopeless"]:
            line += f" {'~' + format(row['hopeless'][name] * 1e6, '.0f'):>12}"
        else:
            line += f" {'–':>12}"
    return line + ("" if row["over"] <= NEAR else f"  {row['over']:.2f} of {row['best']}")

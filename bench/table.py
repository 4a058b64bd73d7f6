"""Printing: the head of a table, a line for each row, and what the rows say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from bench.peer import RUNTIMES

WORDS = {
    "fastnn": "a plain call",
    "frozen": "fastnn's module after fastnn.freeze: its weights are packed",
    "torch": "torch eager",
    "compile": "torch.compile in a process of its own{frozen}",
    "onnx": "ONNX Runtime {onnxruntime} in a process of its own, weights constant",
    "openvino": "OpenVINO {openvino} in a process of its own, weights constant",
    "float32": "fastnn's plain call in float32",
    "frozen32": "fastnn's frozen module in float32",
}
OTHERS = ("compile", *RUNTIMES)  # the peers beside torch eager: their weights are constants
BUSY = 0.25  # cores that others may use before a row says so: its times are not worth much
FLOOR = 20e-6  # seconds: the floor of a problem below this says little, the call itself takes some µs


def key(row: dict) -> tuple:
    """Return what names a row among those of a run."""
    return tuple(row[name] for name in ("family", "id", "dtype", "direction", "threads"))


def columns(rows: Iterable[dict]) -> list[str]:
    """Return the providers that some of the rows have, in the order of the columns."""
    return [name for name in WORDS if any(name in row["times"] for row in rows)]


def ratio(row: dict, name: str, base: str = "fastnn") -> float:
    """Return how many times as long as ``base`` (fastnn or frozen) another provider takes."""
    return row["times"][name]["ratio_frozen" if base == "frozen" else "ratio"]


def own(row: dict) -> str:
    """Return the faster of fastnn's columns: who runs a problem has the choice of them."""
    return min(
        (name for name in ("frozen", "fastnn") if name in row["times"]), key=lambda name: row["times"][name]["p50"]
    )


def best(row: dict) -> str | None:
    """Return the fastest of all peers."""
    peers = [name for name in ("torch", *OTHERS) if name in row["times"]]
    return min(peers, key=lambda name: row["times"][name]["p50"], default=None)


def against_best(row: dict) -> float:
    """Return how many times as long as fastnn, in the faster of its columns, the best peer takes."""
    return ratio(row, best(row), own(row))


def times_floor(row: dict, name: str) -> float:
    """Return a provider's time over the floor."""
    return row["floor"] * row["times"][name]["p50"] / row["times"]["fastnn"]["p50"]


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


class Table:
    """Rows of one family, dtype, direction and number of threads.

    Args:
        names: the providers that have a column.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self.base = "frozen" if "frozen" in names else "fastnn"
        self.judged = self.base == "frozen" or bool(set(OTHERS) & set(names))  # not by torch eager alone
        self.pairs = [(name, "fastnn") for name in names if name in ("torch", "float32")]
        self.pairs += [("torch", "frozen")] * (names.count("torch") and names.count("frozen"))
        self.pairs += [(name, self.base) for name in names if name in (*OTHERS, "frozen32")]

    def head(self, first: dict) -> str:
        """Return the lines above the rows; ``first`` is a row, or what rows share."""
        words = {"frozen": "" if first["direction"] == "training" else ", weights frozen"}
        words |= {package: first.get(package, "") for package in RUNTIMES.values()}
        told = "; ".join(f"{name}: {WORDS[name].format(**words)}" for name in self.names)
        machine = first["machine"]
        if "peak" in first:
            machine += f"; peak {first['peak'] / 1e9:.0f} GFLOP/s, {first['bandwidth'] / 1e9:.0f} GB/s"
        frozen = " and /frozen" if "frozen" in self.names else ""
        lines = [
            f"\n{first['family']}, {first['dtype']}, {first['direction']}, {first['threads']} "
            f"thread{'s' * (first['threads'] > 1)} on {machine}; torch {first['torch']}",
            told + ".",
            f"/fastnn{frozen}: a provider's time over that of this column, above 1 fastnn is faster"
            + ("; best: the fastest peer, over fastnn's faster column" * ("torch" in self.names))
            + "; KiB: memory beyond inputs and results.",
        ]
        line = f"{'problem':28} {'shape':42} {'fastnn µs (p20–p80)':>28}"
        line += f" {'frozen µs':>9}" if "frozen" in self.names else ""
        for name in self.names:
            if name not in ("fastnn", "frozen"):
                line += f" {name + ' µs':>11}"
                line += "".join(f" {'/' + base:>7}" for peer, base in self.pairs if peer == name)
        line += f" {'best':>13}" if "torch" in self.names else ""
        line += f" {'GFLOP/s':>8} {'×floor':>6} {'KiB':>7} {'torch’s':>7} {'error':>8} {'torch’s':>8}"
        return "\n".join([*lines, line])

    def line(self, row: dict, old: dict | None = None) -> str:
        """Return the printed line of a row; ``old`` is the same row of an earlier run."""
        times, fastnn = row["times"], row["times"]["fastnn"]
        spread = f"{fastnn['p50'] * 1e6:.1f} ({fastnn['p20'] * 1e6:.1f}–{fastnn['p80'] * 1e6:.1f})"
        line = f"{row['id']:28} {row['shape']:42} {spread:>28}"
        if "frozen" in self.names:
            line += f" {times['frozen']['p50'] * 1e6:9.1f}" if "frozen" in times else f" {'–':>9}"
        for name in self.names:
            if name not in ("fastnn", "frozen"):
                line += f" {times[name]['p50'] * 1e6:11.1f}" if name in times else f" {'–':>11}"
                for peer, base in self.pairs:
                    if peer == name:
                        line += f" {ratio(row, name, base):7.2f}" if name in times and base in times else f" {'–':>7}"
        if "torch" in self.names:
            line += f" {best(row):>8} {against_best(row):.2f}" if best(row) else f" {'–':>13}"
        line += f" {row['gflops']:8.1f} {row['floor']:6.1f}"
        extra, errors = row.get("extra", {}), row["errors"]
        line += "".join(f" {extra[n] / 1024:7.0f}" if n in extra else f" {'–':>7}" for n in ("fastnn", "torch"))
        line += "".join(f" {errors[n]:8.1e}" if n in errors else f" {'–':>8}" for n in ("fastnn", "torch"))
        if old and "torch" in times and "torch" in old["times"]:
            line += f"  was {ratio(old, 'torch'):.2f}×, now {ratio(row, 'torch') / ratio(old, 'torch'):.2f} of it"
        if "torch" in times:
            line += "  fastnn < torch" if ratio(row, "torch") < 1 else ""
            line += f"  {own(row)} < {best(row)}" if self.judged and against_best(row) < 1 else ""
        if row.get("others", 0) > BUSY:
            line += f"  (others used {row['others']:.1f} cores)"
        return line + (f"  ({row['note']})" if row["note"] else "")

    def means(self, rows: list[dict]) -> str:
        """Return the geometric means of the ratios, with the range."""
        told = []

        def tell(label: str, ratios: list[float]) -> None:
            if ratios:
                told.append(f"{label} {mean(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f}, {len(ratios)})")

        for name, base in self.pairs:
            tell(f"{name}/{base}", [ratio(r, name, base) for r in rows if name in r["times"] and base in r["times"]])
        tell("best/own", [against_best(row) for row in rows if best(row)])
        return ", ".join(told)

    def floors(self, rows: list[dict]) -> str:
        """Return the geometric means of the times over the floor."""
        told = []
        for name in ("fastnn", "frozen"):
            have = [row for row in rows if name in row["times"]]
            long = [row for row in have if row["times"]["fastnn"]["p50"] / row["floor"] >= FLOOR]
            if have:
                told.append(f"{name} {mean(times_floor(r, name) for r in have):.2f}×")
            if long:
                told[-1] += f", {mean(times_floor(r, name) for r in long):.2f}× where it is 20 µs or more ({len(long)})"
        return "; ".join(told)

    def summary(self, rows: list[dict]) -> str:
        """Return the geometric means of all rows and of each group, and what is behind."""
        lines = [f"geometric mean: {self.means(rows)}", f"time over the floor: {self.floors(rows)}"]
        for group in dict.fromkeys(row.get("group", "") for row in rows):
            if group:
                lines.append(f"  {group}: {self.means([row for row in rows if row.get('group') == group])}")
        lines += behind("torch", rows, lambda row: ratio(row, "torch"))
        if self.judged:
            lines += behind("the best peer", rows, against_best)
        busy = sum(row.get("others", 0) > BUSY for row in rows)
        if busy:
            lines.append(f"other processes used the machine during {busy} of {len(rows)} problems")
        return "\n".join(lines)


def behind(whom: str, rows: list[dict], figure: Callable[[dict], float]) -> list[str]:
    """Return the line that lists the rows behind ``whom``, worst first."""
    rows = [row for row in rows if "torch" in row["times"]]
    slow = sorted((figure(row), row["id"]) for row in rows if figure(row) < 1)
    if not rows:
        return []
    return [
        f"behind {whom}: {', '.join(f'{name} {value:.2f}' for value, name in slow)}"
        if slow
        else f"nothing behind {whom}"
    ]


def show(rows: list[dict]) -> None:
    """Print the tables of kept rows."""
    tables: dict[tuple, list[dict]] = {}
    for row in rows:
        tables.setdefault(tuple(row[n] for n in ("family", "dtype", "direction", "threads")), []).append(row)
    for members in tables.values():
        table = Table(columns(members))
        print(table.head(members[0]))
        for row in members:
            print(table.line(row))
        print(table.summary(members), flush=True)

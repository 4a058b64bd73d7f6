"""Printing of the CUDA benchmark: rows, what they say together, and the goals. Needs neither a GPU nor fastnn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from bench.table import mean


def key(row: dict) -> tuple[str, str, str, str]:
    """Return what names a row."""
    return row["family"], row["id"], row["dtype"], row["direction"]


def measured(row: dict) -> bool:
    return "times" in row and not row.get("failed")


def right(row: dict) -> bool:
    """Whether the case ran, its results are near float64's and its gradients the same from run to run."""
    return measured(row) and not row.get("wrong") and row.get("deterministic") is not False


def ratio(row: dict) -> float:
    """Return how many times as long as fastnn the best of torch takes; nothing where the result is wrong."""
    return math.nan if row.get("wrong") else row["times"]["torch"]["ratio"]


def share(row: dict) -> float:
    """Return the share of the measured ceiling that fastnn reaches: of the product's rate or of the copy's bandwidth."""
    return math.nan if row.get("wrong") else row["floor"] / row["times"]["fastnn"]["p50"]


def by_bytes(row: dict) -> bool:
    """Whether memory bounds the case on this machine."""
    return row["bytes"] / row["bandwidth"] > row["flops"] / row["peak"]


def rate(row: dict) -> str:
    seconds = row["times"]["fastnn"]["p50"]
    return (
        f"{row['bytes'] / seconds / 1e9:6.0f} GB/s" if by_bytes(row) else f"{row['flops'] / seconds / 1e12:6.1f} TF/s"
    )


def milliseconds(told: dict[str, float]) -> str:
    return f"{told['p50'] * 1e3:.4f}" if told["p50"] < 1e-3 else f"{told['p50'] * 1e3:.3f}"


HEAD = (
    f"{'case':24} {'shape':42} {'dtype':>8} {'ours ms':>9} {'torch ms':>9}  {'torch’s best':18} {'ratio':>6} "
    f"{'reached':>11} {'share':>5} {'error':>8} {'torch’s':>8}"
)


def line(row: dict) -> str:
    """Return the printed line of a row."""
    text = f"{row['id']:24} {row['shape']:42} {row['dtype']:>8} "
    if not measured(row):
        return text + f"failed: {row.get('failed') or 'not finished'}"
    times, errors = row["times"], row["errors"]
    text += f"{milliseconds(times['fastnn']):>9} {milliseconds(times['torch']):>9}  {row['best']:18} "
    text += f"{times['torch']['ratio']:6.2f} {rate(row)} {row['floor'] / times['fastnn']['p50']:5.0%} "
    text += f"{errors['fastnn']:8.1e} {errors['torch']:8.1e}"
    text += "  WRONG" if row.get("wrong") else ""
    text += "  NOT DETERMINISTIC" if row.get("deterministic") is False else ""
    for side, how in row["how"].items():
        text += f"  ({side} {how})" if how != "graph" else ""
    text += f"  {' + '.join(short(name) for name in row['kernels'])}" if row.get("kernels") else ""
    return text + (f"  ({row['note']})" if row.get("note") else "")


def short(kernel: str) -> str:
    """Return a kernel's name without its namespace, its arguments and most of its template."""
    name, template = re.match(r"(?:void )?([^<(]*)(<.*?>)?", kernel.replace("(anonymous namespace)::", "")).groups()
    numbers = re.findall(r"[<, )](\d+)\b", template or "")
    return name.rsplit("::", 1)[-1] + (f"<{','.join(numbers[:5])}>" if numbers else "")


def ceilings(rows: list[dict]) -> str:
    """Return what the machine reached while these rows were measured."""

    def span(values, unit, scale):
        low, high = min(values) / scale, max(values) / scale
        return f"{low:.2f} {unit}" if high < 1.005 * low else f"{low:.2f}–{high:.2f} {unit}"

    rows = [row for row in rows if measured(row)]
    if not rows:
        return "nothing measured"
    told = f"copy {span([row['bandwidth'] for row in rows], 'TB/s', 1e12)} (read and written)"
    told += f"; torch bfloat16 8192³ {span([row['gemm'] for row in rows], 'TF/s', 1e12)}"
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        if dtype != "bfloat16":
            size = "8192³" if dtype == "float16" else "4096³"
            told += f"; {dtype} {size} {span([row['peak'] for row in rows if row['dtype'] == dtype], 'TF/s', 1e12)}"
    return told


def tables(rows: list[dict]) -> str:
    """Return a table for each family and direction, and the goals."""
    if not rows:
        return "no rows"
    first = rows[0]
    lines = [
        f"{first['machine']}, capability {first.get('capability', '–')}, {first.get('multiprocessors', '–')} "
        f"multiprocessors, L2 {first.get('cache', 0) / 2**20:.0f} MiB; driver {first.get('driver', '–')}; torch "
        f"{first['torch']}, CUDA {first.get('cuda', '–')}, cuDNN {first.get('cudnn', '–')}",
        "ratio: torch's best time over ours, above 1 ours is faster; share: of the ceiling that the machine reached, the "
        "product's or the copy's; error: largest distance from float64 over the largest value.",
    ]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["direction"]), []).append(row)
    for (family, direction), members in groups.items():
        lines += ["", f"{family}, {direction}; {ceilings(members)}", HEAD, *map(line, members)]
        good = [ratio(row) for row in members if measured(row) and not math.isnan(ratio(row))]
        if good:
            lines.append(f"geometric mean {mean(good):.2f}× ({min(good):.2f}–{max(good):.2f}, {len(good)})")
    good, ran = sum(map(right, rows)), sum(map(measured, rows))
    lines += ["", f"{len(rows)} cases: {good} right, {ran - good} wrong, {len(rows) - ran} failed"]
    return "\n".join([*lines, "", goals(rows)])


# ---- goals -----------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """``figure`` of every row whose ``family id dtype direction`` matches; the least of them counts."""

    text: str
    pattern: str
    least: float
    figure: Callable[[dict], float] = ratio
    form: str = "{:.2f}×"


def deterministic(row: dict) -> float:
    return math.nan if row.get("wrong") else float(bool(row.get("deterministic")))


GOALS = [
    Goal("linear bf16 4096³, 8192³: 0.9× cuBLASLt, bias fused", r"linear square\.(4096|8192) bfloat16 forward", 0.9),
    Goal("linear + GELU fused: 1.2× eager", r"linear fused bfloat16 forward", 1.2),
    Goal("linear, 16 rows or fewer: 1.5× eager", r"linear thin\.(1|2|4|8|16) bfloat16 forward", 1.5),
    Goal("linear fp32 at full precision: 2× SGEMM", r"linear square\.4096 float32 forward", 2.0),
    Goal("attention, dense: 0.8× the best backend", r"attention dense\.\d+k(\.causal)? bfloat16 forward", 0.8),
    Goal("attention, window of 1k in 16k: 5× the best with a mask", r"attention window\.1k\.16k bfloat16 forward", 5.0),
    Goal("attention backward: 0.8× the best backend", r"attention dense\.\d+k(\.causal)? bfloat16 backward", 0.8),
    Goal("attention backward: the same bits again", r"attention .* (backward|training)", 1.0, deterministic, "{:.0f}"),
    Goal("attention, decoding: 80 % of the copy's bandwidth", r"attention decode\.(4|16|64)k bfloat16 forward", 0.8, share,
         "{:.0%}"),
]  # fmt: skip


def goals(rows: list[dict]) -> str:
    """Return the table of the goals: met, not met, or not measured."""
    lines = [f"{'goal':58} {'wanted':>7} {'least':>7} {'most':>7}  of        verdict"]
    for goal in GOALS:
        matching = [row for row in rows if re.fullmatch(goal.pattern, " ".join(key(row)))]
        values = [goal.figure(row) for row in matching if measured(row)]
        right = [value for value in values if not math.isnan(value)]
        told = [goal.form.format(value) for value in ((min(right), max(right)) if right else ())] or ["–", "–"]
        if not values and not any(row.get("failed") for row in matching):
            verdict = "not measured"
        elif len(right) == len(matching) and min(right) >= goal.least:
            verdict = "met"
        else:
            verdict = "not met"
            broken = len(matching) - len(right)
            verdict += f" ({broken} wrong or failed)" if broken else ""
        lines.append(
            f"{goal.text:58} {goal.form.format(goal.least):>7} {told[0]:>7} {told[1]:>7}  "
            f"{len(right):>2} of {len(matching):<3} {verdict}"
        )
    return "\n".join(lines)

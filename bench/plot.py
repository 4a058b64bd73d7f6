"""The roofline: each problem's operations per byte against the operations per second that were reached."""

from __future__ import annotations

import importlib.util
import sys

from bench.table import best, own


def check() -> None:
    """End with a clear message where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("bench/run.py: --plot needs matplotlib; pip install matplotlib, or leave --plot out.")


def roofline(rows: list[dict], file: str) -> None:
    """Draw one chart for each table: the peak and the bandwidth as lines, fastnn and its best peer as points.

    Bytes are those of all inputs, weights and outputs, once. What lies above the bandwidth line was served by the cache;
    what lies above the peak did fewer operations than are counted (Winograd).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables: dict[tuple, list[dict]] = {}
    for row in rows:
        tables.setdefault((row["family"], row["dtype"], row["direction"], row["threads"]), []).append(row)
    figure, charts = pyplot.subplots(len(tables), 1, figsize=(18, 11 * len(tables)), squeeze=False)
    for chart, (name, members) in zip(charts[:, 0], tables.items(), strict=True):
        draw(chart, members)
        family, dtype, direction, threads = name
        chart.set_title(f"{family}, {dtype}, {direction}, {threads} thread{'s' * (threads > 1)}")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    print(f"roofline of {len(rows)} rows: {file}")


def draw(chart, rows: list[dict]) -> None:
    """Fill one chart."""
    peak, bandwidth = rows[0]["peak"] / 1e9, rows[0]["bandwidth"] / 1e9
    at = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*at, peak / bandwidth) / 2, max(*at, peak / bandwidth) * 2
    roof = [(low, low * bandwidth), (peak / bandwidth, peak), (high, peak)]
    chart.plot(*zip(*roof, strict=True), color="black", label=f"peak {peak:.0f} GFLOP/s, memory {bandwidth:.0f} GB/s")

    def reached(row: dict, name: str | None) -> float:
        return row["flops"] / row["times"][name]["p50"] / 1e9 if name else float("nan")

    ours = [reached(row, own(row)) for row in rows]
    theirs = [reached(row, best(row)) for row in rows]
    for x, a, b in zip(at, ours, theirs, strict=True):
        chart.plot([x, x], [a, b], color="tab:green" if a >= b else "tab:red", linewidth=0.8)
    chart.scatter(at, ours, s=22, color="tab:blue", zorder=3, label="fastnn, the faster of its columns")
    chart.scatter(at, theirs, s=22, color="tab:orange", zorder=3, marker="x", label="the best peer")
    for row, x, a, b in zip(rows, at, ours, theirs, strict=True):
        chart.annotate(row["id"], (x, a), fontsize=6, xytext=(3, 3), textcoords="offset points")
        if best(row):
            chart.annotate(
                best(row), (x, b), fontsize=5, xytext=(3, -2), textcoords="offset points", color="tab:orange"
            )
    chart.set_xscale("log")
    chart.set_yscale("log")
    chart.set_xlabel("FLOP/byte")
    chart.set_ylabel("GFLOP/s")
    chart.grid(True, which="both", linewidth=0.3)
    chart.legend(loc="lower right")

"""Decoded tokens per second against batch or context, with the ceiling that the bytes set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prhs_cli.plots import latency, style

KIND = "bench-decode"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `prhs bench decode` to `path` (.png, .svg or .pdf).

    Raises:
        InputError: a result of another kind, or an incomplete one. UsageError: another ending.
    """
    with style.styled():
        style.save(figure(result), path)


def figure(result: dict[str, Any]) -> Figure:
    """A panel per shape and context where a batch was varied, else per shape and batch."""
    problems = [row["problem"] for row in result.get("data", {}).get("rows", []) if row.get("problem")]
    by_batch = len({p.get("batch") for p in problems}) > len({p.get("n") for p in problems})
    varied, fixed = ("batch", "n") if by_batch else ("n", "batch")
    title = "{name}, context {n}" if by_batch else "{name}, batch {batch}"
    label = "batch (sequences)" if by_batch else "context (positions)"

    def panel(axis: Axes, rows: list[latency.Row]) -> None:
        latency.chart(axis, rows, varied, _point, label, "decode throughput (tokens/s)")
        (axis.set_ylim if latency.several(rows, varied) else axis.set_xlim)(0)

    return latency.panels(result, (KIND,), ("name", fixed), title, panel)


def _point(row: latency.Row) -> tuple[float, float]:
    """Measured throughput, and that of a step which takes no longer than its bytes."""
    tokens = row["problem"]["batch"] * 1e6
    return tokens / row["timing"]["p50"], tokens / row["floor_us"]

"""Accuracy: score against effective budget, one line per selector, dense as the level to keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prhs_cli.plots import style
from prhs_kernels.errors import InputError

KIND = "evaluate"
COLUMNS = 3
SHIFT = 1.03  # between two selectors along the logarithmic axis
WIDEST = 1.12  # between the first and the last at most
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Panel:
    """Rows of one task (or the mean of several) at one length."""

    title: str
    unit: str
    rows: list[dict[str, Any]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result file of `prhs evaluate` to `path` (.png, .svg or .pdf).

    Raises:
        InputError: a result of another kind, or an incomplete one. UsageError: another ending.
    """
    with style.styled():
        style.save(figure(result), path)


def figure(result: dict[str, Any]) -> Figure:
    """A panel per length for the mean over exact-match tasks, then one per task with another metric."""
    data = style.data_of(result, KIND)
    try:
        panels = list(_panels(data))
        if not panels:
            raise InputError(f"this '{KIND}' result holds no score; run `prhs evaluate` again")
        columns = min(COLUMNS, len(panels))
        rows = math.ceil(len(panels) / columns)
        fig = style.new_figure(1.1 + 2.2 * rows)
        axes: Any = fig.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        axes = list(axes[: len(panels)])
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, data["budgets"])
        style.letter(axes, [panel.title for panel in panels])
        style.legend_above(fig, axes[0], columns=5)
        style.caption(fig, _conditions(result, data))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"this '{KIND}' result is incomplete ({error}); run `prhs evaluate` again"
        ) from error
    return fig


def _panels(data: dict[str, Any]) -> Iterator[Panel]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in data["averages"]:
        count = len(row["tasks"])
        name = row["tasks"][0] if count == 1 else f"mean of {count} tasks"
        groups.setdefault((f"{name}, {row['length']} tokens", "exact match"), []).append(row)
    for row in data["rows"]:
        if row["metric"] != "exact":
            at = f", {row['length']} tokens" if row["length"] else ""
            groups.setdefault((f"{row['task']}{at}", row["unit"]), []).append(row)
    for (title, unit), rows in groups.items():
        yield Panel(title, unit, rows)


def _draw(axis: Axes, panel: Panel, budgets: list[float]) -> None:
    dense = next(row for row in panel.rows if row["selector"] == DENSE)["score"]
    axis.axhline(dense["mean"], color="#555555", linewidth=1.0, label="dense")
    if dense["low"] is not None:
        axis.axhspan(dense["low"], dense["high"], color="#555555", alpha=0.12, linewidth=0)
    there = {row["selector"] for row in panel.rows}
    shown = [(name, look) for name, look in style.EVERY.items() if name in there]
    for number, (name, look) in enumerate(shown):
        aside = min(SHIFT, WIDEST ** (1 / len(shown))) ** (number - (len(shown) - 1) / 2)
        rows = [row for row in panel.rows if row["selector"] == name]
        _series(axis, [row for row in rows if row["budget"] is not None], look.line(), aside)
        # `published` is missing in results of earlier versions
        alone = look.line() | {"linestyle": "none", "markerfacecolor": "none", "label": None}
        _series(axis, [row for row in rows if row.get("published")], alone, aside)
        promised = [row for row in rows if row["delta"] is not None]
        if promised:
            label = f"{look.label} at δ = {promised[0]['delta']:g}"
            apart = {"marker": "P", "linestyle": "none", "markerfacecolor": "none", "markersize": 7}
            _series(axis, promised, look.line() | apart | {"label": label}, aside)
    style.budget_axis(axis, budgets)
    axis.set_xlabel("attended fraction (kept / visible)")  # three panels in a row have no room for more
    exact = panel.unit == "exact match"
    axis.set_ylabel("exact match (share of items)" if exact else panel.unit)
    scores = [row["score"]["mean"] for row in panel.rows]
    if exact:
        axis.set_ylim(-0.03, 1.03)
    elif min(scores) > 0 and max(scores) / min(scores) > style.LOG_RANGE:
        axis.set_yscale("log")


def _series(axis: Axes, rows: list[dict[str, Any]], look: dict[str, Any], aside: float) -> None:
    """Scores at the measured budgets, whatever was asked for, with the paired interval of the difference."""
    if rows:
        rows = sorted(rows, key=lambda row: row["attended_fraction"])
        x = [row["attended_fraction"] * aside for row in rows]
        y = [row["score"]["mean"] for row in rows]
        axis.errorbar(x, y, yerr=style.errors([row["difference"] for row in rows]), **look)


def _conditions(result: dict[str, Any], data: dict[str, Any]) -> str:
    model = result.get("conditions", {}).get("model")
    unmet = sum(row["matched"] is False for row in data["rows"])
    parts = [
        f"Model {model}" if model else "",
        f"{data['samples']} items per task and length, {data['templates']} templates",
        f"loop {data['loop']}",
        f"bars: difference from dense, band: dense itself, by {data['interval']}",
        f"{unmet} of {len(data['rows'])} rows attend to another fraction than asked" if unmet else "",
        "points stand at the measured fraction, moved sideways by up to 6 % so that bars show",
        "open points without a line: at the budgets of the publications"
        if any(row.get("published") for row in data["rows"])
        else "",
        style.versions(result),
    ]
    return "; ".join(part for part in parts if part) + "."

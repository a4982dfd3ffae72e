"""Time against context, one line per case, each with its byte floor: results of `prhs bench`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prhs_cli.plots import style
from prhs_cli.plots.style import Look
from prhs_kernels.bench.report import place
from prhs_kernels.errors import InputError

KIND = "bench-operator"
KINDS = ("bench-operator", "bench-decode")
COLUMNS = 2  # panels side by side
LONG = 30  # letters of a label, of which three do not fit beside each other
BESIDE = 24  # letters of a line of a bar's name
LINE, LINES = 0.17, 4  # inches of a line of the legend, and how many have room in every figure
DENSE = Look("fastest dense", "#000000", "s", "-")
MASKED = Look("masked sdpa as gpt-fast", "#777777", "x", "-")
ATTENTION = Look("attention over given sets", "#4c9a6a", "D", "-.", size=3.5)
RATIOS = (
    ("#123c86", "o", "-"), ("#3f78c9", "v", "--"), ("#b83b55", "^", "-."), ("#dda32f", "P", "--"),
    ("#7a4fa3", "<", "-"), ("#9a6b3f", ">", "-."), ("#2a9d9d", "s", ":"), ("#d46fb0", "h", "--"),
    ("#5b6b1f", "X", "-"), ("#e07b39", "p", "-."), ("#8fb8de", "8", "--"), ("#6b6b6b", "*", ":"),
)  # fmt: skip
Row = dict[str, Any]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `prhs bench operator` or `decode` to `path` (.png, .svg or .pdf).

    Raises:
        InputError: a result of another kind, or an incomplete one. UsageError: another ending.
    """
    with style.styled():
        style.save(figure(result), path)


def figure(result: dict[str, Any]) -> Figure:
    """A panel per shape and batch; dotted: what the bytes of a case take at copy bandwidth."""
    label = "time (µs per layer and step)" if result.get("kind") == KIND else "time (µs per step)"

    def panel(axis: Axes, rows: list[Row]) -> None:
        chart(axis, rows, "n", _point, "context (positions)", label)
        if several(rows, "n"):
            axis.set_yscale("log")
        else:
            axis.set_xlim(0)

    return panels(result, KINDS, ("name", "batch"), "{name}, batch {batch}", panel)


def panels(
    result: dict[str, Any],
    kinds: Sequence[str],
    fields: Sequence[str],
    title: str,
    draw_panel: Callable[[Axes, list[Row]], None],
) -> Figure:
    """A figure with a panel per value of the problem's `fields`, and the conditions below."""
    kind = str(result.get("kind"))
    data = style.data_of(result, kind if kind in kinds else " or ".join(kinds))
    try:
        groups: dict[str, list[Row]] = {}
        for row in data["rows"]:
            if row["timing"] and row["floor_us"] is not None:
                names = {name: row["problem"][name] for name in fields}
                groups.setdefault(title.format(**names), []).append(row)
        if not groups:
            raise InputError(f"this '{kind}' result holds no time; run `prhs bench` again")
        columns = min(COLUMNS, len(groups))
        count = math.ceil(len(groups) / columns)
        fig = style.new_figure(1.6 + 2.4 * count)
        axes: Any = fig.subplots(count, columns, squeeze=False).flatten()
        for axis in axes[len(groups) :]:
            axis.remove()
        used = list(axes[: len(groups)])
        for axis, rows in zip(used, groups.values(), strict=True):
            draw_panel(axis, rows)
        style.letter(used, list(groups))
        _legend(fig, used)
        style.caption(fig, _conditions(result, data["rows"]))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"this '{kind}' result is incomplete ({error}); run `prhs bench` again") from error
    return fig


def lines(rows: list[Row]) -> Iterator[tuple[Look, list[Row]]]:
    """The series of a panel: the fastest dense of every size, the masked one, and the sparse cases."""
    fastest: dict[tuple[Any, ...], Row] = {}
    for row in (row for row in rows if row["kind"] == "dense"):
        best = fastest.setdefault(place(row), row)
        if row["timing"]["p50"] < best["timing"]["p50"]:
            fastest[place(row)] = row
    yield DENSE, list(fastest.values())
    yield MASKED, [row for row in rows if row["case"] == MASKED.label]
    yield ATTENTION, [row for row in rows if row["case"] == "sparse_decode + merge"]
    sparse = [row for row in rows if row["kind"] in ("layer", "sparse") and "ρ = " in row["case"]]
    sizes = {(row["case"], *place(row)) for row in sparse}
    many = len(sizes) < len(sparse)  # the same case with more than one number of kept positions
    ratios: dict[tuple[float, str], list[Row]] = {}
    for row in sparse:
        label = f"{row['case']}, {row['problem']['kept']} kept" if many else row["case"]
        ratios.setdefault((float(row["case"].rpartition("= ")[2].partition(",")[0]), label), []).append(row)
    for key, look in zip(sorted(ratios), cycle(RATIOS), strict=False):
        yield Look(key[1], *look), ratios[key]


def _point(row: Row) -> tuple[float, float]:
    return row["timing"]["p50"], row["floor_us"]


def several(rows: list[Row], varied: str) -> bool:
    """Whether the rows lie at more than one value of the problem's field `varied`."""
    return len({row["problem"][varied] for row in rows}) > 1


def chart(
    axis: Axes,
    rows: list[Row],
    varied: str,
    point: Callable[[Row], tuple[float, float]],
    where: str,
    what: str,
) -> None:
    """Lines over `varied`, or bars where it has one value.

    `point` gives a row's value and what the bytes bound it by; `where` and `what` name the axes.
    """
    found = [(look, series) for look, series in lines(rows) if series]
    if several(rows, varied):
        for look, series in found:
            _line(axis, look, sorted((row["problem"][varied], *point(row)) for row in series))
        positions(axis, sorted({row["problem"][varied] for row in rows}), where)
        axis.set_ylabel(what)
        return
    for height, (look, series) in enumerate(found):
        value, bound = point(series[0])
        axis.barh(height, value, color=look.color, height=0.7)
        for color, width in (("#ffffff", 3.0), ("#000000", 1.2)):
            axis.plot([bound], [height], marker="|", markersize=12, color=color, markeredgewidth=width)
    names = [textwrap.fill(look.label, BESIDE, break_on_hyphens=False) for look, _ in found]
    axis.set_yticks(range(len(found)), names, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(what)
    axis.set_ylabel(f"{where.partition(' ')[0]} {rows[0]['problem'][varied]}")


def _line(axis: Axes, look: Look, points: list[tuple[float, float, float]]) -> None:
    """Points (x, measured, bound set by the bytes); the bound is dotted."""
    x, measured, bound = zip(*points, strict=True)
    axis.plot(x, measured, **look.line())
    axis.plot(x, bound, color=look.color, linestyle=":", linewidth=0.8, marker="_" if len(x) == 1 else "")


def positions(axis: Axes, values: Sequence[int], label: str) -> None:
    """Logarithmic axis with a tick at every measured value."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(values), [f"{v // 1024}k" if v % 1024 == 0 else str(v) for v in values])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def _legend(fig: Figure, axes: Sequence[Axes]) -> None:
    """Every label of any panel once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:  # bars carry their names
        return
    (found["byte floor of each"],) = axes[0].plot([], [], color="#555555", linestyle=":", linewidth=0.8)
    columns = 3 if max(map(len, found)) <= LONG else 2
    fig.set_figheight(fig.get_figheight() + LINE * max(0, math.ceil(len(found) / columns) - LINES))
    fig.legend(
        list(found.values()), list(found), loc="outside upper center", ncols=columns, columnspacing=1.4,
        handlelength=2.6,
    )  # fmt: skip


def _conditions(result: dict[str, Any], rows: list[Row]) -> str:
    rates = [row["copy_rate"] / 1e6 for row in rows]
    kept = sorted({row["problem"]["kept"] for row in rows if row["problem"]["kept"]})
    parts = [
        f"Random tensors, cold L2, medians; {', '.join(map(str, kept))} kept positions per KV head",
        f"floor (dotted; at bars a stroke): bytes at this run's copy bandwidth, {min(rates):.3g} TB/s",
        style.versions(result),
    ]
    return "; ".join(part for part in parts if part) + "."

"""Posterior bias: what selectors drop in excess of the oracle at equal budget, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prhs_cli.plots import style
from prhs_kernels.errors import InputError

KIND = "posterior-bias"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a posterior-bias result file to `path` (.png, .svg or .pdf).

    Raises:
        InputError: a result of another kind, or an incomplete one. UsageError: another ending.
    """
    with style.styled():
        style.save(figure(result), path)


def figure(result: dict[str, Any]) -> Figure:
    """Four panels: dropped mass and excess by budget, missed mass by position, excess by layer."""
    data = style.data_of(result, KIND)
    fig = style.new_figure(5.6)
    panels = fig.subplots(2, 2).flatten()
    try:
        middle = sorted(data["budgets"])[len(data["budgets"]) // 2]
        _dropped(panels[0], data)
        _excess(panels[1], data)
        _positions(panels[2], data, middle)
        _layers(panels[3], data, middle)
        style.caption(fig, _conditions(result, data, middle))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"this '{KIND}' result is incomplete ({error}); run `prhs analyze {KIND}` again"
        ) from error
    at = f"at {style.fraction(middle)}"
    style.letter(
        panels,
        [
            "dropped mass",
            "posterior bias: excess over the oracle",
            f"where the oracle's mass is missed, {at}",
            f"posterior bias by layer, {at}",
        ],
    )
    style.legend_above(fig, panels[0], columns=5)
    return fig


def _cells(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sorted(
        (cell for cell in data["cells"] if cell["selector"] == name), key=lambda cell: cell["budget"]
    )


def _series(axis: Axes, cells: list[dict[str, Any]], measure: str, look: style.Look) -> None:
    """A measure against the measured budget, with intervals over prompts."""
    x = [cell["attended_fraction"] for cell in cells]
    y = [cell[measure]["mean"] for cell in cells]
    axis.errorbar(x, y, yerr=style.errors([cell[measure] for cell in cells]), **look.line())


def _dropped(axis: Axes, data: dict[str, Any]) -> None:
    for name, look in style.EVERY.items():
        if cells := _cells(data, name):
            _series(axis, cells, "dropped_mass", look)
    if cells := _cells(data, "prhs"):
        _series(axis, cells, "oracle_dropped_mass", style.ORACLE_AT_PRHS)
    style.budget_axis(axis, data["budgets"])
    axis.set_ylabel("dropped mass (fraction)")
    axis.set_ylim(bottom=0)


def _excess(axis: Axes, data: dict[str, Any]) -> None:
    names = [name for name in style.EVERY if name != "oracle"]
    drawn = {name: cells for name in names if (cells := _cells(data, name))}
    for name, cells in drawn.items():
        _series(axis, cells, "excess", style.EVERY[name])
    values = [cell["excess"]["mean"] for cells in drawn.values() for cell in cells]
    style.budget_axis(axis, data["budgets"])
    _excess_axis(axis, values)


def _excess_axis(axis: Axes, values: list[float]) -> None:
    axis.set_ylabel("excess dropped mass (fraction)")
    if values and min(values) > 0 and max(values) / min(values) > style.LOG_RANGE:
        axis.set_yscale("log")
        # intervals may reach zero, which a logarithmic axis cannot show
        axis.set_ylim(min(values) / 3, max(values) * 2)
    else:
        axis.set_ylim(bottom=min(0.0, *values) if values else 0.0)


def _positions(axis: Axes, data: dict[str, Any], budget: float) -> None:
    edges = np.array(data["edges"]["position"])
    centres = (edges[1:] + edges[:-1]) / 2
    for name, look in style.EVERY.items():
        for cell in _cells(data, name):
            if cell["budget"] == budget and name != "oracle":
                _band(axis, centres, cell["by_position"]["missed_mass"], look)
    axis.set_xlabel("relative position of the key (0: first, 1: the query's)")
    axis.set_ylabel("missed mass per 5 % of positions")
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)


def _layers(axis: Axes, data: dict[str, Any], budget: float) -> None:
    layers = np.arange(data["num_layers"])
    values: list[float] = []
    for name, look in style.EVERY.items():
        for cell in _cells(data, name):
            if cell["budget"] == budget and name != "oracle":
                _band(axis, layers, cell["by_layer"]["excess"], look)
                values += cell["by_layer"]["excess"]["mean"]
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _excess_axis(axis, values)


def _band(axis: Axes, x: Any, entry: dict[str, Any], look: style.Look) -> None:
    axis.plot(x, entry["mean"], **look.line())
    if entry["low"] is not None:
        axis.fill_between(
            x, np.clip(entry["low"], 0, None), entry["high"], color=look.color, alpha=0.18, linewidth=0
        )


def _conditions(result: dict[str, Any], data: dict[str, Any], budget: float) -> str:
    unmatched = [cell for cell in data["cells"] if not cell["matched"]]
    parts = [
        f"Model {data['model']}" if "model" in data else "",
        f"{data['num_prompts']} held-out prompts of {data['context_length']} tokens"
        if "context_length" in data
        else f"{data['num_prompts']} held-out prompts",
        f"{data['num_steps']} decode steps, {data['loop']} loop (dense model, teacher forced)",
        f"bars and bands: {100 * data['confidence']:g} % Student t intervals over prompts",
        "bias: dropped mass beyond that of the oracle with as many positions in every (step, layer, KV head)",
        _cost(data, budget),
        style.versions(result),
    ]
    parts += [
        f"{style.EVERY[cell['selector']].label} attended {cell['attended_fraction']:.3f} "
        f"where {style.fraction(cell['budget'])} was asked"
        for cell in unmatched
    ]
    return "; ".join(part for part in parts if part) + "."


def _cost(data: dict[str, Any], budget: float) -> str:
    """Equal attended fractions hide what choosing them costs: bytes read, scans included."""
    read = [
        f"{look.label} {cell['kv_bytes_read']:.2f}"
        for name, look in style.EVERY.items()
        for cell in _cells(data, name)
        if cell["budget"] == budget
    ]
    shared = [cell["retrieval_ratio"] for cell in _cells(data, "prhs") if cell["budget"] == budget]
    ratio = f", retrieval ratio of PrHS {shared[0]:.2f}" if shared and shared[0] is not None else ""
    return f"KV bytes read at {style.fraction(budget)}, scans included (dense is 1): {', '.join(read)}{ratio}"

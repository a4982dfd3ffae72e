"""verify-bound: dropped mass per layer and head against δ, lost information against its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prhs_cli.plots import style
from prhs_kernels.errors import InputError

KIND = "bound"
_DARK, _MID, _LIGHT = "#123c86", "#b83b55", "#dda32f"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a verify-bound result file to `path` (.png, .svg or .pdf).

    Raises:
        InputError: a result of another kind, or an incomplete one. UsageError: another ending.
    """
    with style.styled():
        style.save(figure(result), path)


def figure(result: dict[str, Any]) -> Figure:
    """Two panels over the layers: dropped mass, and the change of mutual information."""
    data = style.data_of(result, KIND)
    fig = style.new_figure(3.3)
    panels = fig.subplots(1, 2)
    try:
        _dropped(panels[0], data)
        _information(panels[1], data)
        style.caption(fig, _conditions(result, data))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"this '{KIND}' result is incomplete ({error!r}); run `prhs verify-bound` again"
        ) from error
    style.letter(panels, [f"dropped mass: {data['verdict']} at δ = {data['delta']:g}", "mutual information"])
    for axis in panels:
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=2.4)
    return fig


def _dropped(axis: Axes, data: dict[str, Any]) -> None:
    heads = np.array(data["dropped_mass"])
    decision = data["decision"]
    layers = np.arange(len(heads))
    axis.axhspan(
        decision["lower"],
        decision["upper"],
        color="#000000",
        alpha=0.12,
        linewidth=0,
        label=f"mean of all, {100 * decision['confidence']:g} % bounds",
    )
    axis.axhline(data["delta"], color="#000000", linestyle="--", label="δ asked")
    _heads(axis, layers, heads, _LIGHT, "query heads")
    axis.plot(layers, heads.mean(1), color=_DARK, marker="o", label="layer mean")
    axis.set_ylabel("dropped mass (fraction)")
    axis.set_ylim(bottom=0)


def _information(axis: Axes, data: dict[str, Any]) -> None:
    gap = np.array(data["information_gap"])
    layers = np.arange(len(gap))
    axis.plot(
        layers,
        np.array(data["marginal"]).mean(1),
        color=_LIGHT,
        linestyle="-.",
        marker="^",
        label="marginal bound",
    )
    axis.plot(
        layers, np.array(data["fano"]).mean(1), color=_MID, linestyle="--", marker="s", label="Fano bound"
    )
    _heads(axis, layers, gap, "#8fa3c7", "query heads")
    axis.plot(layers, gap.mean(1), color=_DARK, marker="o", label="measured, layer mean")
    axis.set_ylabel("|I(Q; J) − I(Q; Ĵ)| (nats)")
    # dense layers lose nothing: a logarithmic axis with a linear foot still shows them
    positive = gap[gap > 0]
    axis.set_yscale("symlog", linthresh=float(positive.min()) if positive.size else 1e-3)
    axis.set_ylim(bottom=0)


def _heads(axis: Axes, layers: Any, values: Any, color: str, label: str) -> None:
    x = np.repeat(layers, values.shape[1])
    axis.plot(x, values.flatten(), color=color, marker="_", linestyle="none", markersize=7, label=label)


def _conditions(result: dict[str, Any], data: dict[str, Any]) -> str:
    decision, stats = data["decision"], data["stats"]
    conditions = result.get("conditions", {})
    parts = [
        f"Model {conditions['model']}" if conditions.get("model") else "",
        f"{decision['num_prompts']} held-out prompts, {data['decode_steps']} decode steps",
        f"{data['loop']} loop",
        f"λ = {data['lambda']:.3g}",
        f"mean dropped mass {decision['mean']:.4g} in [{decision['lower']:.4g}, {decision['upper']:.4g}]",
        f"attended fraction {stats['attended_fraction']:.3g}" if stats.get("attended_fraction") else "",
        f"worst: layer {data['worst_layer']}, query head {data['worst_head']}",
        "bounds are means over heads, evaluated prompt by prompt",
        style.versions(result),
    ]
    return "; ".join(part for part in parts if part) + "."

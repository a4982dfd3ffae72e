"""The risk curve stored in a bundle: loss along the dial, and the point that was chosen for δ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from prhs_calibration.risk import running_maximum
from prhs_cli.plots import style

if TYPE_CHECKING:
    from prhs_calibration.bundle import Bundle

PROMPTS_DRAWN = 64  # thin lines behind the mean; more would be a smear


def draw(bundle: Bundle, path: Path) -> None:
    """Draw the risk curve of `bundle` to `path` (.png, .svg or .pdf); UsageError for another ending."""
    with style.styled():
        style.save(figure(bundle), path)


def figure(bundle: Bundle) -> Figure:
    """Loss of the selection split against the dial λ, with what risk control compares with δ."""
    dial = bundle.dial.double().numpy()
    losses = bundle.tensors["risk/loss"].double().numpy()
    count = len(losses)
    guarded = (count * running_maximum(losses).mean(0) + 1) / (count + 1)
    chosen, delta = float(dial[bundle.metadata.dial_index]), bundle.metadata.delta
    fig = style.new_figure(3.4)
    axis = fig.subplots()
    axis.plot(dial, losses[:PROMPTS_DRAWN].T, color="#b9c4d8", linewidth=0.4, zorder=1)
    axis.plot([], [], color="#b9c4d8", linewidth=0.8, label="single prompts")
    axis.plot(dial, losses.mean(0), **style.SELECTORS["prhs"].line() | {"label": "mean loss R̂(λ)"})
    if bundle.metadata.target == "expected":
        label = "(n R̂ + 1) / (n + 1), compared with δ"
        axis.plot(dial, guarded, **style.SELECTORS["quest"].line() | {"label": label})
    axis.axhline(delta, color="#000000", linestyle=":", label=f"δ = {delta:g}")
    axis.axvline(chosen, color="#000000", linestyle="-.", linewidth=0.9, label=f"chosen λ = {chosen:.3g}")
    axis.set_xlabel("dial λ (mean nominal budget, fraction of kv_len)")
    axis.set_ylabel("dropped mass (fraction)")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, float(np.nanmax([*losses.mean(0), *guarded, 2 * delta])) * 1.05)
    style.legend_above(fig, axis, columns=3)
    style.caption(fig, _conditions(bundle, count))
    return fig


def _conditions(bundle: Bundle, count: int) -> str:
    metadata = bundle.metadata
    return (
        f"Model {metadata.model_id}; closed-loop loss of {count} prompts of the selection split, up to "
        f"{metadata.context_length} tokens; target {metadata.target}; guarded: each prompt's running "
        "maximum towards dense before the mean."
    )

"""What all figures share: how a selector looks, axes, panel letters, captions and saving."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import textwrap
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prhs_calibration.files import atomic_write
from prhs_kernels.errors import InputError, UsageError

WIDTH = 7.0  # inches, the text width of a two-column paper
FORMATS = (".png", ".svg", ".pdf")
LOG_RANGE = 20  # largest / smallest value from which on a linear axis would hide the small ones
LEGEND_ENTRIES = 6  # more of them stand in four columns, else they leave the page
CAPTION_COLUMNS = 150  # characters of a caption line at `WIDTH`


@dataclasses.dataclass(frozen=True)
class Look:
    """A series is told apart by marker and line as well as by colour; colours differ in lightness too."""

    label: str
    color: str
    marker: str
    linestyle: Any
    filled: bool = True
    size: float = 4.5  # points

    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        face = self.color if self.filled else "none"
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.linestyle,
            "markerfacecolor": face,
            "markersize": self.size,
            "label": self.label,
        }


SELECTORS = {
    "oracle": Look("oracle top-k, uniform size", "#000000", "D", ":", size=3.5),
    "prhs": Look("PrHS", "#123c86", "o", "-"),
    "quest": Look("Quest", "#b83b55", "s", "--"),
    "streaming-llm": Look("StreamingLLM", "#dda32f", "^", "-."),
}
# more than colours can tell apart: marker and line do
OTHERS = {
    "h2o": Look("H2O", "#2a7f62", "v", (0, (5, 1))),
    "snapkv": Look("SnapKV", "#7a5195", "<", (0, (3, 1, 1, 1))),
    "double-sparse": Look("DoubleSparse", "#4a90a4", ">", (0, (1, 1))),
    "hshare": Look("HShare", "#8a5a2b", "p", (0, (5, 1, 1, 1, 1, 1))),
    "tidal-decode": Look("TidalDecode", "#3b6fb5", "X", (0, (8, 2))),
    "kascade": Look("Kascade", "#6b7a1f", "d", (0, (2, 1))),
    "twilight": Look("Twilight", "#c2559d", "*", (0, (6, 1, 1, 1))),
}
EVERY = SELECTORS | OTHERS
ORACLE_AT_PRHS = Look("oracle top-k at PrHS's sizes", "#000000", "o", (0, (1, 3)), filled=False, size=7)

_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markeredgewidth": 1.0,
    "errorbar.capsize": 2,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "savefig.dpi": 300,
    "svg.fonttype": "none",
    "svg.hashsalt": "prhs",  # otherwise ids of clip paths differ from run to run
    "pdf.fonttype": 42,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Our settings on top of matplotlib's defaults, whatever a matplotlibrc says; undone afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of `WIDTH` x `height` inches; never registered with pyplot."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write PNG, SVG or PDF, as the ending says; the same figure gives the same bytes.

    Raises:
        UsageError: another ending. InputError, ResourceError: as `prhs_calibration.files.atomic_write`.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"output {path}: the ending must be one of {', '.join(FORMATS)}")
    # no dates: a figure drawn twice from one result is the same file
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:], metadata=undated)
    atomic_write(path, buffer.getvalue())


def caption(figure: Figure, text: str) -> None:
    """Conditions below the figure, in small print."""
    figure.supxlabel("\n".join(textwrap.wrap(text, CAPTION_COLUMNS)), fontsize=6, color="#444444")


def letter(axes: Sequence[Axes], titles: Sequence[str]) -> None:
    """Title every panel: (a), (b), ..."""
    for index, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        axis.set_title(f"({chr(ord('a') + index)}) {title}")


def fraction(value: float) -> str:
    """`0.125` as 1/8 where that is exact, else as a percentage."""
    exact = Fraction(value).limit_denominator(256)
    if abs(float(exact) - value) < 1e-9 and exact.numerator == 1:
        return f"1/{exact.denominator}"
    return f"{100 * value:.3g} %"


def budget_axis(axis: Axes, budgets: Sequence[float]) -> None:
    """Logarithmic axis of attended fractions with a tick at every nominal budget."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(budgets), [fraction(budget) for budget in budgets])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("attended fraction (kept / visible positions)")


def errors(entries: Sequence[dict[str, Any]]) -> Any:
    """Distances from means to bounds `[2, points]` as `Axes.errorbar` takes them; None without intervals."""
    if any(entry["low"] is None for entry in entries):
        return None
    below = [entry["mean"] - entry["low"] for entry in entries]
    above = [entry["high"] - entry["mean"] for entry in entries]
    return np.clip([below, above], 0, None)


def legend_above(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for all panels, above them, where it hides no data."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(columns, 4) if len(labels) > LEGEND_ENTRIES else columns
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, columnspacing=1.4, handlelength=2.6
    )


def data_of(result: dict[str, Any], kind: str) -> dict[str, Any]:
    """The data of a result of `kind`. InputError for any other result."""
    if result.get("kind") != kind or not isinstance(result.get("data"), dict):
        raise InputError(
            f"not a '{kind}' result (kind is {result.get('kind')!r}); draw the figure of that kind"
        )
    data: dict[str, Any] = result["data"]
    return data


def versions(result: dict[str, Any]) -> str:
    """Versions, device and precision from a result's conditions, as part of a caption."""
    conditions = result.get("conditions", {})
    known = conditions.get("versions", {})
    parts = [f"{name} {known[name]}" for name in ("prhs", "torch") if known.get(name)]
    parts += [str(conditions[name]) for name in ("device", "dtype") if conditions.get(name)]
    return ", ".join(parts)

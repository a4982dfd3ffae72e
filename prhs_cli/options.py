"""Options that several commands share, with the same name, meaning and check everywhere."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _fraction(value: float | None) -> float | None:
    return _between(value, "0.02 means 2 % of the mass")


def _confidence(value: float) -> float | None:
    return _between(value, "0.95 errs in one of twenty cases")


def _between(value: float | None, example: str) -> float | None:
    if value is not None and not 0 < value < 1:  # also refuses nan
        raise typer.BadParameter(f"{value:g} is not between 0 and 1 (both excluded); {example}")
    return value


def _share(text: str) -> float | str:
    try:
        value = 1.0 if text == "auto" else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise typer.BadParameter(
            f"{text} is neither auto nor in (0, 1]; 0.05 measures every twentieth unit, 1 all of them"
        )
    return text if text == "auto" else value


def _temperature(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{value:g} is not a number >= 0; 0 is greedy")
    return value


def _top_p(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value:g} is not in (0, 1]; 1 keeps every token")
    return value


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated option, without spaces and empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


PUBLISHED = "published"


def split_budgets(text: str) -> tuple[tuple[float, ...], bool]:
    """Attended fractions of a comma-separated option, and whether `published` is among them."""
    parts = split_list(text)
    try:
        fractions = tuple(float(Fraction(part)) for part in parts if part != PUBLISHED)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1/16,0.25", param_hint="--budgets"
        ) from None
    return fractions, PUBLISHED in parts


def complete_model(incomplete: str) -> list[str]:
    """Names that the shell offers for a model; hub ids and folders are typed out."""
    from prhs_calibration.hub import ALIASES, EMBEDDED

    return [name for name in (*EMBEDDED, *ALIASES) if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=complete_model,
        help="Alias (see `prhs models`), hub id, local folder, or `reference`, the embedded model.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        autocompletion=complete_model,
        help="Alias (see `prhs models`), hub id, local folder, or `reference`.",
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub model.", show_default=False)
]
# named outright: typer before 0.29 takes a metavar that is the parameter's name in capitals for its name
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", help="`auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:1`."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="`auto` (float32 on CPU, bfloat16 on CUDA), `float32`, `bfloat16` or `float16`.",
    ),
]
BenchDtype = Annotated[
    str,
    typer.Option("--dtype", metavar="DTYPE", help="`auto` (bfloat16), `bfloat16`, `float16` or `float32`."),
]
Seed = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Seed of everything random; the same seed gives the same result."),
]

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A file that `prhs calibrate` wrote.", show_default=False)
]
BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        "-b",
        metavar="BUNDLE",
        help="Bundle file; without it your newest one that fits the model, else the embedded model's own.",
        show_default=False,
    ),
]
Delta = Annotated[
    float,
    typer.Option(
        callback=_fraction, metavar="X", help="Dropped attention mass that may be lost on average, in (0, 1)."
    ),
]
BundleDelta = Annotated[
    float | None,
    typer.Option(
        callback=_fraction,
        metavar="X",
        help="Operate the bundle at this dropped mass; without it at the one it was calibrated for.",
        show_default=False,
    ),
]
Confidence = Annotated[
    float, typer.Option(callback=_confidence, metavar="X", help="Confidence of the interval, in (0, 1).")
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        min=64,
        metavar="N",
        help="Longest prompt in tokens; without it the model's own context.",
        show_default=False,
    ),
]
VerifiedLength = Annotated[
    int | None,
    typer.Option(
        min=64,
        metavar="N",
        help="Longest prompt in tokens; without it that of the bundle's calibration.",
        show_default=False,
    ),
]
Corpus = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", help="Text file or folder, repeatable; without it built-in text.", show_default=False
    ),
]
Backend = Annotated[
    Literal["auto", "reference", "triton"],
    typer.Option(
        "--backend",
        help="`auto`: triton kernels under a CUDA graph on a GPU, PyTorch elsewhere; see `prhs doctor`.",
    ),
]
Mode = Annotated[
    Literal["audited", "released"],
    typer.Option(
        "--mode",
        help="`audited` keeps every position, so that the dropped mass can be measured; `released` frees the "
        "memory of positions that no later step can reach.",
    ),
]
Audit = Annotated[
    Any,  # a float, "auto" or None
    typer.Option(
        parser=_share,
        metavar="P|auto",
        help="Measure this run's own dropped mass: retrievals exactly, and a share P of the other units; "
        "`auto` is one that costs a few per cent of the time.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float, typer.Option(callback=_temperature, metavar="X", help="Sampling temperature; 0 is greedy.")
]
TopP = Annotated[
    float,
    typer.Option(callback=_top_p, metavar="X", help="Sample from the smallest set with this probability."),
]
ResultOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="RESULT.json",
        help="Result file; without it a new one in your data folder.",
        show_default=False,
    ),
]

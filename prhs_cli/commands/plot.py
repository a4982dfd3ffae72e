"""`prhs plot`: draw a figure from saved result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prhs_cli import options
from prhs_cli.commands import analyze, evaluate, verify_bound
from prhs_cli.loading import Source
from prhs_cli.output import Output
from prhs_kernels.errors import InputError, UsageError

EPILOG = """\b
Examples:
  prhs plot posterior-bias                       the newest result, or a small analysis made for it
  prhs plot posterior-bias result.json -o figure.pdf
  prhs plot bound                                the newest result of verify-bound
  prhs plot risk reference.safetensors           the risk curve of a bundle
  prhs plot accuracy                             the newest result of evaluate
  prhs plot latency                              the newest result of bench operator
  prhs plot throughput                           the newest result of bench decode"""

# kinds of the results that a figure is drawn from, where they are named otherwise
KINDS = {"accuracy": "evaluate", "latency": "bench-operator", "throughput": "bench-decode"}
SMALL = 4  # prompts of the analysis that is made when there is no result
SMALL_TASKS = ("single_needle", "perplexity")


def command(
    figure: Annotated[
        Literal["posterior-bias", "bound", "risk", "accuracy", "latency", "throughput"],
        typer.Argument(help="What to draw.", show_default=False),
    ],
    result: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RESULT]",
            help="Result file (risk: a bundle); without it the newest in your data folder.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Figure, .png, .svg or .pdf; default FIGURE.png in this folder.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw a figure from a saved result or a bundle.

    Results are those of analyze, verify-bound, evaluate and bench.
    """
    out = Output(as_json=as_json, quiet=quiet)
    path = output or Path(f"{figure}.png")
    from prhs_calibration.files import check_writable
    from prhs_cli.plots import style

    if path.suffix.lower() not in style.FORMATS:
        raise UsageError(f"output {path}: the ending must be one of {', '.join(style.FORMATS)}")
    check_writable(path)
    source = result or _newest(figure) or _small(out, figure)
    if result is None:
        out.note(f"drawing {source}")
    _draw(figure, source, path)
    out.result({"figure": str(path), "result": str(source)}, f"wrote {path}")


def _draw(figure: str, source: Path, path: Path) -> None:
    if figure == "risk":
        from prhs_calibration.bundle import Bundle
        from prhs_cli.plots import risk

        return risk.draw(Bundle.load(source), path)
    import importlib

    from prhs_calibration.results import read_result

    module = importlib.import_module(f"prhs_cli.plots.{figure.replace('-', '_')}")
    module.draw(read_result(source, kind=None if figure == "latency" else KINDS.get(figure, figure)), path)


def _newest(figure: str) -> Path | None:
    if figure != "risk":
        from prhs_calibration import results

        return results.newest(KINDS.get(figure, figure))
    from prhs_calibration import bundle_store

    usable = [stored.path for stored in bundle_store.list_bundles() if stored.problem is None]
    return usable[0] if usable else bundle_store.reference_bundle_path()


def _small(out: Output, figure: str) -> Path:
    """A result made for the figure, so that a newcomer sees one."""
    if figure in ("latency", "throughput"):
        raise InputError(
            f"no result of prhs {KINDS[figure].replace('-', ' ')} yet; run that on a machine with a GPU, "
            "or give a result file"
        )
    out.note(
        f"no result in your data folder (one written elsewhere is given by name): making one from {SMALL} "
        "prompts on an embedded model"
    )
    if figure == "bound":
        return verify_bound.run(out, Source(), None, 0, None, num_prompts=SMALL)[0]
    if figure == "accuracy":
        return evaluate.run(out, Source("reference-8k"), None, list(SMALL_TASKS), None, samples=SMALL)[0]
    return analyze.run(out, figure, Source(), None, 0, num_prompts=SMALL)[0]

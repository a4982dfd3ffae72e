"""`prhs plot`: draw a figure from saved result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prhs_cli import options
from prhs_cli.commands import analyze
from prhs_cli.loading import Source
from prhs_cli.output import Output
from prhs_kernels.errors import UsageError

EPILOG = """\b
Examples:
  prhs plot posterior-bias                       the newest result, or a small analysis made for it
  prhs plot posterior-bias result.json -o figure.pdf"""

FORMATS = (".png", ".svg", ".pdf")
SMALL = 4  # prompts of the analysis that is made when there is no result


def command(
    figure: Annotated[Literal["posterior-bias"], typer.Argument(help="What to draw.", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RESULT]...", help="Result files; without any the newest one.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help=".png, .svg or .pdf; default FIGURE.png.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw a figure from the result files of `prhs analyze`."""
    out = Output(as_json=as_json, quiet=quiet)
    path = output or Path(f"{figure}.png")
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"output {path}: the ending must be one of {', '.join(FORMATS)}")
    from prhs_calibration.files import check_writable
    from prhs_calibration.results import read_result

    check_writable(path)
    sources = results or [_newest_or_small(out, figure)]
    contents = [read_result(source, kind=figure) for source in sources]
    _draw(figure, contents, path)
    out.result({"figure": str(path), "results": [str(source) for source in sources]}, f"wrote {path}")


def _draw(figure: str, contents: list[dict[str, Any]], path: Path) -> None:
    import importlib

    module = importlib.import_module(f"prhs_cli.plots.{figure.replace('-', '_')}")
    module.plot(contents, path)


def _newest_or_small(out: Output, figure: str) -> Path:
    from prhs_calibration import results

    found = results.newest(figure)
    if found is not None:
        out.note(f"drawing {found}")
        return found
    out.note(
        f"no result yet: analyzing {SMALL} prompts on the embedded model; `prhs analyze {figure}` does more"
    )
    return analyze.run(out, figure, Source(), None, seed=0, num_prompts=SMALL)[0]

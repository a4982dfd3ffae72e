"""`prhs plot`: draw a figure from saved result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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

SMALL = 4  # prompts of the analysis that is made when there is no result


def command(
    figure: Annotated[Literal["posterior-bias"], typer.Argument(help="What to draw.", show_default=False)],
    result: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RESULT]", help="Result file; without it the newest one.", show_default=False
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
    """Draw a figure from a result file of `prhs analyze`."""
    out = Output(as_json=as_json, quiet=quiet)
    path = output or Path(f"{figure}.png")
    from prhs_calibration.files import check_writable
    from prhs_calibration.results import read_result
    from prhs_cli.plots import posterior_bias, style

    if path.suffix.lower() not in style.FORMATS:
        raise UsageError(f"output {path}: the ending must be one of {', '.join(style.FORMATS)}")
    check_writable(path)
    source = result or _newest_or_small(out, figure)
    posterior_bias.draw(read_result(source, kind=figure), path)
    out.result({"figure": str(path), "result": str(source)}, f"wrote {path}")


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

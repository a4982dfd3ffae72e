"""`prhs analyze`: compare selectors and keep what is needed to draw it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prhs_cli import options
from prhs_cli.loading import Source, conditions
from prhs_cli.output import Output, interruptible, table

EPILOG = """\b
Examples:
  prhs analyze posterior-bias
  prhs analyze posterior-bias --selectors prhs,quest,h2o,snapkv --budgets 1/16,1/8,published
  prhs plot posterior-bias"""


def command(
    analysis: Annotated[
        Literal["posterior-bias"], typer.Argument(help="What to analyze.", show_default=False)
    ],
    selectors: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help="Of oracle, prhs, streaming-llm, quest (these by default), h2o, snapkv, double-sparse, "
            "hshare, tidal-decode, kascade, twilight.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y,…",
            help="Attended fractions in (0, 1), default 1/16, 1/8, 1/4; `published`: those of each paper.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of the held-out split.")] = 16,
    context_length: options.ContextLength = None,
    confidence: options.Confidence = 0.95,
    model: options.Model = "reference",
    bundle: options.BundleOption = None,
    output: options.ResultOutput = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what selectors miss that an oracle keeps.

    posterior-bias: dropped mass in excess of an oracle that keeps as many positions, and where it is lost.
    Open loop, on the dense model's own queries and keys.
    """
    out = Output(as_json=as_json, quiet=quiet)
    settings: dict[str, Any] = {"context_length": context_length}
    if selectors:
        settings["selectors"] = options.split_list(selectors)
    if budgets:
        settings["budgets"], settings["published"] = options.split_budgets(budgets)
    source = Source(model, bundle, revision, device, dtype)
    path, result = run(
        out, analysis, source, output, seed, num_prompts=prompts, confidence=confidence, **settings
    )
    out.result(result, cells_table(result["data"]), f"wrote {path}")


def run(
    out: Output, analysis: str, source: Source, output: Path | None, seed: int, **settings: Any
) -> tuple[Path, dict[str, Any]]:
    """Analyze and write the result file; return its path and content."""
    from prhs_calibration import results
    from prhs_calibration.evaluation import posterior_bias

    path = results.output_path(output, analysis)
    loaded, bundle = source.open(out)
    with interruptible("no result was written"), out.progress() as progress:
        data = posterior_bias.analyze(loaded, bundle, seed=seed, progress=progress, **settings)
    made = conditions(loaded, bundle, seed)
    results.write_result(path, analysis, made, data)
    return path, results.envelope(analysis, made, data)


def cells_table(data: dict[str, Any]) -> Any:
    """One row per selector and budget, then one per published budget."""
    columns = [
        "selector",
        "budget",
        "attended",
        "as asked",
        "ρ",
        "KV read",
        "dropped mass",
        "excess over oracle",
        "miss rate",
    ]
    cells = sorted(data["cells"], key=lambda cell: cell["budget"]) + data["published"]
    rows = [
        [
            cell["selector"],
            cell["published"] or cell["budget"],
            cell["attended_fraction"],
            "published" if cell["published"] else cell["matched"],
            "-" if cell["retrieval_ratio"] is None else cell["retrieval_ratio"],
            cell["kv_bytes_read"],
            cell["dropped_mass"]["mean"],
            cell["excess"]["mean"],
            cell["miss_rate"]["mean"],
        ]
        for cell in cells
    ]
    return table(columns, rows, title=f"{data['num_prompts']} held-out prompts, {data['loop']} loop")

"""`prhs evaluate`: accuracy of selectors on long-context tasks and public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prhs_cli import accuracy, options
from prhs_cli.errors import Interrupted
from prhs_cli.loading import Source, choose_bundle, conditions, load_model
from prhs_cli.output import Output

if TYPE_CHECKING:
    from prhs_calibration.evaluation.store import Store

EPILOG = """\b
Examples:
  prhs evaluate --samples 4 --lengths 2048
  prhs evaluate --tasks single_needle,perplexity --selectors prhs,oracle --budgets 1/16,1/8,1/4
  prhs evaluate --tasks gsm8k,coqa --model llama-3.1-8b    lm-evaluation-harness: pip install 'prhs[eval]'
  prhs plot accuracy
Built-in tasks: single_needle, multi_key_needle, lookup_64, variable_tracking, multi_value, common_word,
  paragraph_question, copy_span, perplexity."""


def command(
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help="Built-in tasks (default: all), or tasks of lm-evaluation-harness.",
            show_default=False,
        ),
    ] = None,
    selectors: Annotated[
        str,
        typer.Option(
            metavar="A,B,…", help="What to compare, of dense and those of `prhs analyze`; dense always runs."
        ),
    ] = "dense,prhs,oracle,streaming-llm,quest",
    budgets: Annotated[
        str,
        typer.Option(
            metavar="X,Y,…",
            help="Attended fractions in (0, 1), the same for all; `published`: those of each paper.",
        ),
    ] = "1/16,1/8,1/4",
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,M,…",
            help="Tokens per item; default 2048,4096 as far as the model goes.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Items per task and length.")] = 16,
    templates: Annotated[
        Literal["seen", "unseen"],
        typer.Option(help="Surface forms and names: as in the reference model's training, or held out."),
    ] = "seen",
    delta: options.BundleDelta = None,
    task_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with more task files of the harness (YAML).", show_default=False
        ),
    ] = None,
    confidence: options.Confidence = 0.95,
    model: options.Model = "reference-8k",  # the smaller one fails these tasks with dense attention
    bundle: options.BundleOption = None,
    output: options.ResultOutput = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score selectors against dense attention on tasks.

    At equal attended fraction, in closed loop: every scored token is a decode step. PrHS runs at the dial of
    its bundle that attends to the asked fraction, and with --delta also at the one that promises this dropped
    mass. On a GPU dense attention and PrHS run on the kernels of `prhs generate`, other methods in PyTorch.
    An interrupted run continues when the same command is given again.
    """
    out = Output(as_json=as_json, quiet=quiet)
    fractions, published = options.split_budgets(budgets)
    settings = {
        "selectors": tuple(options.split_list(selectors)),
        "budgets": fractions,
        "published": published,
        "samples": samples,
        "templates": templates,
        "delta": delta,
        "task_path": None if task_path is None else str(task_path),
        "confidence": confidence,
        "seed": seed,
        "backend": backend,
    }
    asked = _lengths(lengths) if lengths else None
    source = Source(model, bundle, revision, device, dtype)
    path, result = run(out, source, output, options.split_list(tasks) if tasks else None, asked, **settings)
    out.result(result, *accuracy.tables(result["data"]), *accuracy.doubts(result["data"]), f"wrote {path}")


def run(
    out: Output,
    source: Source,
    output: Path | None,
    tasks: list[str] | None,
    lengths: list[int] | None,
    **settings: Any,
) -> tuple[Path, dict[str, Any]]:
    """Evaluate and write the result file; return its path and content."""
    from prhs_calibration import results
    from prhs_calibration.evaluation import evaluate as library
    from prhs_calibration.evaluation.plan import Plan

    own, public = library.split_tasks(tasks)
    plan = Plan(own, tuple(lengths or ()), public=public, **settings)
    path = results.output_path(output, library.KIND)
    loaded = load_model(out, source.model, revision=source.revision, device=source.device, dtype=source.dtype)
    bundle = choose_bundle(out, loaded, source.bundle) if plan.needs_bundle else None
    plan = plan.for_context(loaded.context_length)
    store = library.open_store(loaded, bundle, plan)
    if len(store):
        out.note(f"continuing an interrupted run: {store.count('items/')} items are done")
    try:
        with out.progress() as progress:
            data = library.evaluate(loaded, bundle, plan, store, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(_kept(store)) from None
    made = conditions(loaded, bundle, plan.seed)
    results.write_result(path, library.KIND, made, data)
    store.remove()
    return path, results.envelope(library.KIND, made, data)


def _kept(store: Store) -> str:
    if not len(store):
        return "interrupted: nothing was finished yet, no result was written"
    items = store.count("items/")
    kept = f"{items} finished items are" if items else "no item was finished, what was found for matching is"
    return f"interrupted: {kept} kept; the same command continues there"


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in options.split_list(text)]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 2048,4096", param_hint="--lengths"
        ) from None

"""`prhs calibrate`: fit the selectors to a model and write a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prhs_cli import options
from prhs_cli.loading import load_model
from prhs_cli.output import Output, interruptible, pairs
from prhs_kernels.runtime.distributed import finish, launched

if TYPE_CHECKING:
    from prhs_calibration.models import LoadedModel

EPILOG = """\b
Examples:
  prhs calibrate reference
  prhs calibrate reference --delta 0.05 --prompts 128 -o reference.safetensors
  prhs calibrate ./my-llama --corpus notes/ --corpus book.txt --context-length 8192
  prhs calibrate llama-3.1-8b --dry-run
  torchrun --nproc-per-node 4 -m prhs_cli calibrate llama-3.1-8b     four GPUs share the prompts"""


def command(
    model: options.ModelArgument,
    delta: options.Delta = 0.02,
    prompts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts that choose the operating point.")
    ] = 128,
    fit_prompts: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Prompts that fit the schedules; default by model.", show_default=False
        ),
    ] = None,
    context_length: options.ContextLength = None,
    corpus: options.Corpus = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="BUNDLE", help="Default: in your data folder.", show_default=False
        ),
    ] = None,
    target: Annotated[
        Literal["expected", "high-probability"],
        typer.Option(
            help="What is at most δ: the expected loss, or the loss of this bundle with high probability."
        ),
    ] = "expected",
    axes: Annotated[
        str, typer.Option(metavar="A,B,…", help="Selectors to use, of time, depth and layer.")
    ] = "time,depth,layer",
    key_copy: Annotated[
        Literal["auto", "exact", "int8", "fp8", "int4"],
        typer.Option(
            help="What retrievals scan: keys or a copy of fewer bits; auto: what reads the fewest bytes."
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the cost in time and memory.")
    ] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit the selectors to MODEL and write a bundle.

    Measures the model on calibration text, fits the three selectors, and picks by conformal risk control
    the sparsest operating point whose dropped attention mass on fresh prompts like these is expected to be
    at most δ.
    """
    out = Output(as_json=as_json, quiet=quiet)
    if output is not None:
        from prhs_calibration.files import check_writable

        check_writable(output)
    if dry_run:
        cost = _cost(model, revision, prompts, fit_prompts, context_length)
        return out.result(cost, _rendered(cost))
    from prhs_calibration import calibrate as library

    loaded = load_model(out, model, revision=revision, device=device, dtype=dtype, spread="prompts")
    path = output or _default_path(loaded, delta)
    with interruptible("no bundle was written"), out.progress() as progress:
        outcome = library.calibrate(
            loaded,
            delta=delta,
            num_prompts=prompts,
            fit_prompts=fit_prompts,
            context_length=context_length,
            sources=corpus,
            seed=seed,
            axes=frozenset(options.split_list(axes)),
            key_copy=key_copy,
            target=target,
            progress=progress,
        )
        if launched().rank == 0:
            outcome.bundle.save(path)
    out.result({"bundle": str(path), **outcome.summary}, *_render(path, outcome.summary))
    finish()


def _default_path(loaded: LoadedModel, delta: float) -> Path:
    from prhs_calibration import bundle_store, files

    path = bundle_store.default_path(loaded.model_id, loaded.weights_hash, delta)
    files.check_writable(path)
    return path


def _cost(
    name: str, revision: str | None, prompts: int, fit_prompts: int | None, context_length: int | None
) -> dict[str, Any]:
    """What a calibration would take, from the model's config alone."""
    from prhs_calibration import calibrate, hub, models

    source = hub.locate(name, revision)
    config = models.load_config(source)
    most = config.max_position_embeddings
    length = models.check_length(context_length or most, most, source.model_id)
    cost = calibrate.estimate_cost(
        config, num_prompts=prompts, fit_prompts=fit_prompts, context_length=length
    )
    return dataclasses.asdict(cost)


def _rendered(cost: dict[str, Any]) -> Any:
    tokens = f"{cost['prefill_tokens']:,} in prefills, {cost['decode_steps']:,} as decode steps"
    minutes = cost["flops"] / 1e14 / 60
    facts = {
        "prompts": cost["prompts"],
        "tokens": tokens,
        "arithmetic": f"{cost['flops']:.3g} FLOP, {minutes:.3g} minutes at 100 TFLOP/s",
        "memory": f"{cost['peak_bytes'] / 2**30:.3g} GiB at its peak, beside the weights",
    }
    return pairs(facts, title="estimated cost")


def _render(path: Path, summary: dict[str, Any]) -> list[Any]:
    axes = {f"{axis} axis": _axis(found) for axis, found in summary["axes"].items()}
    facts = {
        "model": summary["model"],
        "promise": f"dropped mass at most δ = {summary['delta']:g} ({summary['target']})",
        "prompts": ", ".join(f"{split} {count}" for split, count in summary["prompts"].items()),
        "operating point": f"λ = {summary['lambda']:.4g} (point {summary['dial_index'] + 1} of "
        f"{summary['dial_points']}), mean loss {summary['risk']:.4g}",
        f"worst {summary['tail_share']:.0%} of steps": f"{summary['tail']:.4g}; measured, not promised",
        **axes,
        "retrievals scan": _scan(summary),
        "heads that share sets": f"{summary['heads_that_share']} of {summary['heads']}",
        "KV bytes read / dense": f"{summary['predicted_cost']:.4g} predicted at the operating point, "
        "scans included",
    }
    return [pairs(facts), f"wrote {path}"]


def _scan(summary: dict[str, Any]) -> str:
    """The kind of key copy in use, and what was predicted for every kind compared, where the fit is at δ."""
    compared = ", ".join(
        f"{found['kind']} {found['predicted_cost']:.4g} (recall {found['recall']:.3f})"
        for found in summary["key_copies"]
    )
    return f"{summary['key_copy']} keys" + (
        f"; KV bytes predicted by the fit: {compared}" if compared else ""
    )


def _axis(found: dict[str, Any]) -> str:
    if not found["on"]:
        return f"off: {found['why']}"
    return f"on from layer {found['start_layer']}, base {found['base']:.4g}, misfit {found['misfit']:.3g}"

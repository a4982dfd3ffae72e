"""`prhs verify-bound`: check the promise of a bundle on prompts it has not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prhs_cli import errors, options
from prhs_cli.loading import Source, conditions
from prhs_cli.output import Output, interruptible, pairs

if TYPE_CHECKING:
    from prhs_calibration.verify import VerificationReport

KIND = "bound"
EPILOG = """\b
Examples:
  prhs verify-bound
  prhs verify-bound --delta 0.02 --prompts 64 --confidence 0.99
  prhs verify-bound --model ./my-llama --bundle mine.safetensors --strict
\b
Exit codes: 0 held, or undecided without --strict; 1 violated, or undecided with --strict."""


def command(
    delta: options.BundleDelta = None,
    bundle: options.BundleOption = None,
    model: options.Model = "reference",
    prompts: Annotated[int, typer.Option(min=2, metavar="N", help="Prompts of the held-out split.")] = 32,
    confidence: options.Confidence = 0.95,
    output: options.ResultOutput = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when the prompts cannot decide.")] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check on held-out prompts that the dropped attention mass stays at most δ.

    Closed loop, every scored token a decode step. Measures the dropped mass and the exact mutual information
    of dense and sparse attention per layer and head, and compares them with δ and the bounds it implies.
    """
    out = Output(as_json=as_json, quiet=quiet)
    from prhs_calibration import results
    from prhs_calibration.verify import verify_bound

    path = results.output_path(output, KIND)
    loaded, chosen = Source(model, bundle, revision, device, dtype).open(out)
    with interruptible("no result was written"), out.progress() as progress:
        report = verify_bound(
            loaded,
            chosen,
            delta=chosen.metadata.delta if delta is None else delta,
            num_prompts=prompts,
            confidence=confidence,
            seed=seed,
            progress=progress,
        )
    made, data = conditions(loaded, chosen, seed), report.to_dict()
    results.write_result(path, KIND, made, data)
    out.result(results.envelope(KIND, made, data), *_report(report), f"wrote {path}")
    if report.verdict == "violated" or (strict and report.verdict == "undecided"):
        raise typer.Exit(errors.VIOLATED)


def _report(report: VerificationReport) -> list[Any]:
    facts = {key: value for key, value in report.to_dict().items() if not isinstance(value, dict | list)}
    return [pairs(facts), f"verdict: {report.verdict}"]

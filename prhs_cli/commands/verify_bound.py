"""`prhs verify-bound`: check the promise of a bundle on prompts it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prhs_cli import errors, options
from prhs_cli.loading import Source, conditions
from prhs_cli.output import Output, interruptible, pairs, table

if TYPE_CHECKING:
    from prhs_calibration.verify import VerificationReport

KIND = "bound"
EPILOG = """\b
Examples:
  prhs verify-bound
  prhs verify-bound --delta 0.02 --prompts 640 --confidence 0.99
  prhs verify-bound --model ./my-llama --bundle mine.safetensors --strict
\b
Exit codes: 0 held, or undecided without --strict; 1 violated, or undecided with --strict."""


def command(
    delta: options.BundleDelta = None,
    bundle: options.BundleOption = None,
    model: options.Model = "reference",
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of the held-out split.")] = 400,
    confidence: options.Confidence = 0.95,
    context_length: options.VerifiedLength = None,
    corpus: options.Corpus = None,
    output: options.ResultOutput = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when the prompts cannot decide.")] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check the bound on held-out prompts, with a confidence.

    Is the dropped attention mass at most δ on average? Closed loop, every scored token a decode step.
    Measures the dropped mass and the exact mutual information of dense and sparse attention per layer and
    head, and compares them with δ and the bounds it implies.
    """
    out = Output(as_json=as_json, quiet=quiet)
    source = Source(model, bundle, revision, device, dtype)
    settings = {"context_length": context_length, "sources": corpus, "confidence": confidence}
    path, result, report = run(out, source, output, seed, delta, num_prompts=prompts, **settings)
    out.result(result, *_render(result["data"]), f"wrote {path}")
    if not report.same_corpus:
        out.note(
            "these prompts are of other text or length than the calibration's, for which alone something is "
            "promised; give its --corpus and --context-length"
        )
    if report.case is not None:
        out.note(f"a theorem failed numerically, which is a bug: please report {_save_case(path, report)}")
    if report.verdict == "violated" or (strict and report.verdict == "undecided"):
        raise typer.Exit(errors.VIOLATED)


def run(
    out: Output, source: Source, output: Path | None, seed: int, delta: float | None, **settings: Any
) -> tuple[Path, dict[str, Any], VerificationReport]:
    """Verify and write the result file; return its path, content and report. Default δ: the bundle's."""
    from prhs_calibration import results
    from prhs_calibration.verify import verify_bound

    path = results.output_path(output, KIND)
    loaded, bundle = source.open(out)
    asked = bundle.metadata.delta if delta is None else delta
    with interruptible("no result was written"), out.progress() as progress:
        report = verify_bound(loaded, bundle, delta=asked, seed=seed, progress=progress, **settings)
    made, data = conditions(loaded, bundle, seed), report.to_dict()
    results.write_result(path, KIND, made, data)
    return path, results.envelope(KIND, made, data), report


def _save_case(path: Path, report: VerificationReport) -> Path:
    """The rows on which a theorem failed, beside the result file."""
    import safetensors.torch

    from prhs_calibration.files import atomic_write

    case = path.with_suffix(".case.safetensors")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in (report.case or {}).items()}
    atomic_write(case, safetensors.torch.save(tensors))
    return case


def _render(data: dict[str, Any]) -> list[Any]:
    decision, layer, head = data["decision"], data["worst_layer"], data["worst_head"]
    facts = {
        "dropped mass": f"{decision['mean']:.4g}, at least {decision['lower']:.4g} and at most "
        f"{decision['upper']:.4g} with confidence {decision['confidence']:g} each",
        "asked": f"δ = {data['delta']:g} at λ = {data['lambda']:.4g}",
        "measured on": f"{decision['num_prompts']} held-out prompts, {data['decode_steps']} decode steps, "
        f"{data['loop']} loop",
        f"worst {data['tail_share']:.0%} of steps": f"{data['tail_mean']:.4g}; measured, not promised",
        "by kind of prompt": ", ".join(
            f"{kind} {found['dropped_mass']:.4g}" for kind, found in data["kinds"].items()
        ),
        "worst head": f"layer {layer}, head {head}: {data['worst_dropped_mass']:.4g}",
        "mean over sparse layers": data["mean_over_sparse_layers"],
        "Fano bound at δ": f"{data['fano_of_delta']:.4g} nats",
        "output distribution": f"total variation {data['output_tv']:.4g} on {data['output_prompts']} prompts",
        "retrieval ratio ρ": data["stats"]["retrieval_ratio"],
        "effective budget": f"{data['stats']['effective_budget']:.4g} positions",
        "attended fraction": data["stats"]["attended_fraction"],
        "KV bytes read / dense": f"{data['stats']['kv_bytes_read']:.4g}, scans included",
        "theorems checked": "all hold" if not data["violations"] else f"{len(data['violations'])} FAILED",
    }
    return [_layers(data), pairs(facts), _verdict(data)]


def _layers(data: dict[str, Any]) -> Any:
    """One row per layer: means over its query heads, and its worst head."""
    columns = [
        "layer",
        "dropped",
        "worst head",
        "MI dense",
        "MI sparse",
        "|ΔMI|",
        "Fano",
        "marginal",
        "prefill",
    ]
    names = ("dropped_mass", "information_dense", "information_sparse", "information_gap", "fano", "marginal")
    rows = []
    for layer, dropped in enumerate(data["dropped_mass"]):
        means = [sum(data[name][layer]) / len(data[name][layer]) for name in names]
        rows.append([layer, means[0], max(dropped), *means[1:], data["prefill_dropped"][layer]])
    return table(columns, rows, title="dropped mass, and mutual information with its bounds in nats")


def _verdict(data: dict[str, Any]) -> str:
    decision = data["decision"]
    line = f"{data['verdict']}: dropped mass {decision['mean']:.4g} against δ = {data['delta']:g}"
    if data["verdict"] != "undecided":
        return line
    needed = decision["prompts_to_decide"]
    return f"{line}; " + (
        f"about {needed} prompts would decide" if needed else "too close for any number of prompts"
    )

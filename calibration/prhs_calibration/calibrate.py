"""Calibration: fit the schedules on one split, choose λ on another, write what was found into a bundle."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from prhs_calibration import corpus, fit, memory, risk
from prhs_calibration.bundle import Bundle
from prhs_calibration.bundle_format import BundleMetadata
from prhs_calibration.family import AXES, AXIS_PROMPTS, Family, fit_family
from prhs_calibration.key_copies import AUTO
from prhs_calibration.models import LoadedModel
from prhs_calibration.profile import DECODE_STEPS, Progress, closed_loop
from prhs_calibration.results import version_of
from prhs_calibration.statistics import TAIL_SHARE
from prhs_kernels.errors import UsageError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.distributed import from_rank_zero

NUM_SINKS, NUM_LOCAL = 4, 16


@dataclasses.dataclass(frozen=True)
class CalibrationOutcome:
    """The bundle, and what `prhs calibrate` prints about it."""

    bundle: Bundle
    summary: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a calibration will take: tokens through the model, and bytes beyond the weights at its peak."""

    prompts: int
    prefill_tokens: int
    decode_steps: int
    flops: float
    peak_bytes: int


def fit_prompts_for(num_prompts: int) -> int:
    """Size of the fit split when none is asked for: a quarter of the selection split, 8 to 32."""
    return min(32, max(8, num_prompts // 4))


def calibrate(
    loaded: LoadedModel,
    *,
    delta: float,
    num_prompts: int = 128,
    fit_prompts: int | None = None,
    context_length: int | None = None,
    sources: list[Path] | None = None,
    seed: int = 0,
    axes: Collection[str] = AXES,
    key_copy: str = AUTO,
    target: str = "expected",
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> CalibrationOutcome:
    """Calibrate a model so that the mean dropped mass of a fresh prompt is at most `delta`.

    Args:
        num_prompts: size of the selection split, on which λ is chosen; `fit_prompts` more fit the schedules.
        context_length: tokens of the longest prompt; the model's own context by default.
        sources: files or folders of text; the built-in corpus by default.
        axes: which of "time", "depth", "layer" may be used.
        key_copy: what retrievals scan: "exact", "int8", "fp8", "int4", or "auto", which compares all but fp8.
        target: "expected" or "high-probability" (docs/guarantees.md).

    Raises:
        UsageError: δ outside (0, 1), unknown axis or key copy, too few prompts for this δ, or a length beyond
            the model's context.
        InputError: text that does not fill the prompts.
    """
    _check(delta, num_prompts, axes, key_copy, target, confidence)
    report = progress or (lambda stage, done, total: None)
    length = loaded.prompt_length(context_length)
    sizes: dict[corpus.Split, int] = {
        "fit": fit_prompts or fit_prompts_for(num_prompts),
        "select": num_prompts,
    }
    needed = memory.run_bytes(loaded.model.config, length, loaded.model.dtype, DECODE_STEPS)
    memory.check_memory(needed, loaded.model.device, f"calibration prompts of {length} tokens")
    report("corpus", 0, 1)
    prompts = {
        split: corpus.build(
            loaded.tokenizer,
            count=count,
            context_length=length,
            seed=seed,
            split=split,
            sources=sources,
            decode_steps=DECODE_STEPS,
        )
        for split, count in sizes.items()
    }
    base = dataclasses.replace(dense_params(loaded.model.config), num_sinks=NUM_SINKS, num_local=NUM_LOCAL)
    family = fit_family(
        loaded.model,
        prompts["fit"],
        delta=delta,
        num_select=num_prompts,
        base=base,
        axes=axes,
        key_copy=key_copy,
        progress=report,
    )
    family = from_rank_zero(family)  # GPUs may differ in the last bits, the ranks of a curve must not
    draft = _draft(loaded, family, prompts, length, seed, delta, target, confidence, sources)
    losses, tails = closed_loop(
        loaded.model,
        prompts["select"],
        [draft.params(index) for index in range(len(draft.dial))],
        lambda done, total: report("risk curve", done, total),
    )
    choice = risk.choose_dial(losses, delta, target, confidence)
    tensors = {**draft.tensors, "risk/loss": torch.tensor(losses, dtype=torch.float32)}
    tensors["profile/tail"] = torch.tensor(tails.mean(axis=0), dtype=torch.float32)
    bundle = dataclasses.replace(draft, tensors=tensors).with_dial(choice.index)
    return CalibrationOutcome(bundle, _summary(bundle, choice, family))


def _draft(
    loaded: LoadedModel,
    family: Family,
    prompts: dict[corpus.Split, list[corpus.Prompt]],
    length: int,
    seed: int,
    delta: float,
    target: str,
    confidence: float,
    sources: list[Path] | None,
) -> Bundle:
    """The bundle without its risk curve, at the dense end: what is measured is what will be loaded."""
    metadata = BundleMetadata(
        model_id=loaded.model_id,
        revision=loaded.revision,
        fingerprint=loaded.fingerprint,
        weights_hash=loaded.weights_hash,
        tokenizer_hash=loaded.tokenizer_hash,
        corpus_hash=corpus.corpus_hash([*prompts["fit"], *prompts["select"]]),
        seeds={"corpus": seed},
        split_sizes={"fit": len(prompts["fit"]), "select": len(prompts["select"]), "verify": 0},
        context_length=length,
        delta=delta,
        dial_index=len(family.dial.lam) - 1,
        target=target,
        confidence=confidence,
        num_sinks=NUM_SINKS,
        num_local=NUM_LOCAL,
        freeze_mode=family.freeze_mode.name.lower(),
        key_copy=family.dial.scan.kind.value,
        library_versions=_versions(),
        report={**family.report, "corpus": "given" if sources else "built-in"},
    )
    return Bundle(metadata, family.tensors)


def estimate_cost(
    config: Any,
    *,
    num_prompts: int,
    fit_prompts: int | None = None,
    context_length: int,
    dtype: torch.dtype = torch.bfloat16,
    decode_steps: int = DECODE_STEPS,
) -> Cost:
    """Tokens, FLOPs and peak memory of a calibration, for `--dry-run`; every prompt counts at full length.

    Peak bytes: what `memory.run_bytes` says of one prompt, prompts being run one after another.
    """
    shape = dense_params(config)
    fit_count = fit_prompts or fit_prompts_for(num_prompts)
    passes = 2 * fit_count + 4 * AXIS_PROMPTS + num_prompts  # prefills
    decode_passes = 2 * fit_count + 4 * AXIS_PROMPTS + num_prompts * len(fit.dial_targets(0.02, num_prompts))
    weights = config.num_hidden_layers * (
        3 * config.hidden_size * config.intermediate_size
        + config.hidden_size * shape.head_dim * (2 * shape.num_qo_heads + 2 * shape.num_kv_heads)
    )
    scores = 4 * shape.num_layers * shape.num_qo_heads * shape.head_dim
    prefill, decode = passes * context_length, decode_passes * decode_steps
    flops = 2 * weights * (prefill + decode) + scores * context_length * (prefill / 2 + decode)
    peak = memory.run_bytes(config, context_length, dtype, decode_steps)
    return Cost(num_prompts + fit_count, prefill, decode, float(flops), peak)


def _check(
    delta: float, num_prompts: int, axes: Collection[str], key_copy: str, target: str, confidence: float
) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"delta = {delta} must lie between 0 and 1, both excluded")
    unknown = sorted(set(axes) - set(AXES))
    if unknown or not axes:
        raise UsageError(f"axes = {', '.join(unknown) or 'none'}: choose from {', '.join(AXES)}")
    if key_copy not in (AUTO, *KeyCopyKind):
        raise UsageError(f"key copy {key_copy!r}: choose from {', '.join((AUTO, *KeyCopyKind))}")
    needed = risk.prompts_needed(delta, target, confidence)
    if num_prompts < needed:
        raise UsageError(
            f"{num_prompts} prompts cannot promise delta = {delta} ({target}): at least {needed} are needed; "
            "give more prompts or a larger delta"
        )


def _versions() -> dict[str, str]:
    names = ("prhs", "torch", "transformers", "numpy", "scipy", "safetensors")
    found = {name: version_of(name) or "unknown" for name in names}
    return {**found, "python": platform.python_version()}


def _summary(bundle: Bundle, choice: risk.DialChoice, family: Family) -> dict[str, Any]:
    index = choice.index
    sharing = [s for row in family.dial.setting for s in row if s.gate]
    return {
        "model": bundle.metadata.model_id,
        "delta": choice.delta,
        "target": str(choice.target),
        "prompts": bundle.metadata.split_sizes,
        "lambda": float(bundle.dial[index]),
        "dial_index": index,
        "dial_points": len(bundle.dial),
        "risk": choice.risk,
        "tail": float(bundle.tensors["profile/tail"][index]),
        "tail_share": TAIL_SHARE,
        "key_copy": bundle.metadata.key_copy,
        "key_copies": family.report["key_copies"],
        "risk_bound": choice.evidence,
        "predicted_cost": float(family.dial.cost[index]),
        "heads_that_share": len(sharing),
        "heads": sum(len(row) for row in family.dial.setting),
        "axes": family.report["axes"],
    }

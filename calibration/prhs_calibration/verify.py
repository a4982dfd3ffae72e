"""Held-out closed-loop runs of a bundle: does the promise hold, and do the theorems?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prhs_calibration import betting, corpus, memory
from prhs_calibration.bounds import fano_envelope
from prhs_calibration.bundle import Bundle
from prhs_calibration.comparison import compare_attention
from prhs_calibration.models import LoadedModel
from prhs_calibration.profile import DECODE_STEPS, Progress
from prhs_calibration.statistics import TAIL_SHARE, worst_steps
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.runtime.stats import DecodeStats

OUTPUT_PROMPTS = 32  # prompts on which the dense model is run too, for the total variation of its predictions


@dataclasses.dataclass(frozen=True, eq=False)
class VerificationReport:
    """What was measured on the verification split. Arrays over layers L, query heads Hq; informations in
    nats.

    delta: the bound asked for. decision: verdict and interval over prompts. losses: `[prompts]`.
    dropped_mass, information_dense, information_sparse, information_gap (mean absolute difference), fano,
    marginal: `[L, Hq]` means over prompts, the bounds evaluated prompt by prompt. fano_of_delta: the bound at
    δ itself, for the longest context. tail: `[L, Hq]`, dropped mass of the worst steps (`worst_steps`) of
    each prompt, a measured figure that nothing promises. prefill_dropped: `[L]`, decode steps apart.
    output_tv: mean total variation of next-token distributions on the first `output_prompts` prompts.
    violations: theorems that failed numerically, a bug in this code. kinds: number, mean dropped mass and
    tail of each kind of prompt.
    """

    delta: float
    dial_index: int
    lam: float
    same_corpus: bool
    decision: betting.Decision
    losses: np.ndarray
    dropped_mass: np.ndarray
    tail: np.ndarray
    information_dense: np.ndarray
    information_sparse: np.ndarray
    information_gap: np.ndarray
    fano: np.ndarray
    marginal: np.ndarray
    fano_of_delta: float
    sparse_layers: list[int]
    prefill_dropped: np.ndarray
    output_tv: float
    output_prompts: int
    decode_steps: int
    stats: dict[str, float]
    violations: list[dict[str, Any]]
    case: dict[str, torch.Tensor] | None
    kinds: dict[str, dict[str, float]]

    @property
    def verdict(self) -> str:
        """held, violated or undecided; a failed theorem is a violation whatever the interval says."""
        return str(betting.Verdict.VIOLATED) if self.violations else str(self.decision.verdict)

    @property
    def worst(self) -> tuple[int, int]:
        """Layer and query head with the largest mean dropped mass."""
        layer, head = np.unravel_index(self.dropped_mass.argmax(), self.dropped_mass.shape)
        return int(layer), int(head)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, everything but the saved case."""
        layer, head = self.worst
        arrays = {
            name: getattr(self, name).tolist()
            for name in (
                "losses",
                "dropped_mass",
                "tail",
                "information_dense",
                "information_sparse",
                "information_gap",
                "fano",
                "marginal",
                "prefill_dropped",
            )
        }
        return {
            "loop": "closed",
            "delta": self.delta,
            "dial_index": self.dial_index,
            "lambda": self.lam,
            "same_corpus": self.same_corpus,
            "verdict": self.verdict,
            "decision": {**dataclasses.asdict(self.decision), "verdict": str(self.decision.verdict)},
            "worst_layer": layer,
            "worst_head": head,
            "worst_dropped_mass": float(self.dropped_mass[layer, head]),
            "worst_layer_mean": int(self.dropped_mass.mean(axis=1).argmax()),
            "tail_share": TAIL_SHARE,
            "tail_mean": float(self.tail.mean()),
            "mean_over_sparse_layers": self.mean_over_sparse_layers,
            "sparse_layers": self.sparse_layers,
            "fano_of_delta": self.fano_of_delta,
            "output_tv": self.output_tv,
            "output_prompts": self.output_prompts,
            "decode_steps": self.decode_steps,
            "stats": self.stats,
            "kinds": self.kinds,
            "violations": self.violations,
            **arrays,
        }

    @property
    def mean_over_sparse_layers(self) -> float:
        """Mean dropped mass over the layers in which some step dropped something."""
        return float(self.dropped_mass[self.sparse_layers].mean()) if self.sparse_layers else 0.0


class _Measurement:
    """Collects one prompt's layers."""

    def __init__(self, params: SelectorParams, prompt: int) -> None:
        shape = (params.num_layers, params.num_qo_heads)
        names = (
            "dropped_mass",
            "tail",
            "information_dense",
            "information_sparse",
            "information_gap",
            "fano",
            "marginal",
        )
        self.tables = {name: np.zeros(shape) for name in names}
        self.params, self.prompt = params, prompt
        self.violations: list[dict[str, Any]] = []
        self.case: dict[str, torch.Tensor] | None = None
        self.reused = self.contested = False

    def __call__(self, rows: LayerObservation) -> None:
        frozen = self.params.frozen_prefix(rows.layer, int(rows.positions[0])) > 0
        kept = rows.kept.repeat_interleave(self.params.group_size, dim=0)
        compared = compare_attention(rows.dense_probs, rows.sparse_probs, None if frozen else kept)
        gap = compared.information_loss.abs()
        dropped = (rows.dense_probs - rows.sparse_probs).clamp(min=0).sum(-1)
        values = {
            "dropped_mass": compared.delta_mean,
            "information_dense": compared.information_dense,
            "information_sparse": compared.information_sparse,
            "information_gap": gap,
            "fano": compared.fano,
            "marginal": compared.marginal,
        }
        for name, value in values.items():
            self.tables[name][rows.layer] = value.cpu().numpy()
        self.tables["tail"][rows.layer] = worst_steps(dropped.double().cpu().numpy())
        self.contested |= bool(rows.contested.any())
        self.reused |= bool((rows.contested & ~rows.retrieved).any())
        for theorem in compared.violations:
            self.violations.append({"prompt": self.prompt, "layer": rows.layer, "theorem": theorem})
            if self.case is None:
                self.case = {"dense": rows.dense_probs, "sparse": rows.sparse_probs, "kept": rows.kept}


def verify_bound(
    loaded: LoadedModel,
    bundle: Bundle,
    *,
    delta: float,
    num_prompts: int = 400,
    confidence: float = 0.95,
    context_length: int | None = None,
    sources: list[Path] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerificationReport:
    """Measure a bundle on prompts that neither its fit nor its choice of λ has seen; every scored token a
    decode step.

    Raises:
        UsageError: δ or confidence outside (0, 1), no prompts, a length beyond the model's context.
        InputError: the bundle is for another model or cannot promise δ; sets were never reused.
    """
    if not 0 < confidence < 1 or num_prompts < 1:
        raise UsageError(
            f"confidence = {confidence} must be in (0, 1) and prompts = {num_prompts} at least 1"
        )
    bundle.check_model(loaded.fingerprint, loaded.weights_hash)
    report = progress or (lambda stage, done, total: None)
    index = bundle.dial_for(delta)
    params = bundle.params(index)
    length = loaded.prompt_length(
        context_length or min(bundle.metadata.context_length, loaded.context_length)
    )
    needed = memory.run_bytes(loaded.model.config, length, loaded.model.dtype, DECODE_STEPS)
    memory.check_memory(needed, loaded.model.device, f"verification prompts of {length} tokens")
    prompts = corpus.build(
        loaded.tokenizer,
        count=num_prompts,
        context_length=length,
        seed=seed,
        split="verify",
        sources=sources,
        decode_steps=DECODE_STEPS,
    )
    measured: list[_Measurement] = []
    stats = DecodeStats()
    prefill = np.zeros(params.num_layers)
    output_tv: list[float] = []
    for number, prompt in enumerate(prompts):
        report("verify", number, len(prompts))
        scorer = Scorer(loaded.model, prompt.input_ids, prompt.prefill_length)
        measurement = _Measurement(params, number)
        result = scorer.run(params, measurement)
        measured.append(measurement)
        stats = stats.merged(result.stats)
        for layer, dropped in result.prefill_dropped.items():
            prefill[layer] += float(dropped.mean()) / len(prompts)
        if number < OUTPUT_PROMPTS:
            dense = scorer.run(dense_params(loaded.model.config))
            output_tv.append(_total_variation(dense.logits, result.logits))
    report("verify", len(prompts), len(prompts))
    _check_reuse(params, measured)
    tables = {name: np.stack([m.tables[name] for m in measured]) for name in measured[0].tables}
    losses = tables["dropped_mass"].mean(axis=(1, 2))
    steps = sum(len(p.input_ids) - p.prefill_length for p in prompts)
    return VerificationReport(
        delta=delta,
        dial_index=index,
        lam=float(bundle.dial[index]),
        same_corpus=length == bundle.metadata.context_length
        and bundle.metadata.report.get("corpus") == ("given" if sources else "built-in"),
        decision=betting.decide(losses, delta, confidence),
        losses=losses,
        **{name: table.mean(axis=0) for name, table in tables.items()},
        fano_of_delta=_fano_of(delta, prompts),
        sparse_layers=np.flatnonzero(tables["dropped_mass"].mean(axis=(0, 2)) > 1e-6).tolist(),
        prefill_dropped=prefill,
        output_tv=float(np.mean(output_tv)),
        output_prompts=len(output_tv),
        decode_steps=steps,
        stats=stats.to_dict(),
        violations=[violation for m in measured for violation in m.violations],
        case=next((m.case for m in measured if m.case is not None), None),
        kinds=_by_kind([prompt.kind for prompt in prompts], losses, tables["tail"].mean(axis=(1, 2))),
    )


def _by_kind(kinds: list[str], losses: np.ndarray, tails: np.ndarray) -> dict[str, dict[str, float]]:
    found = {}
    for kind in sorted(set(kinds)):
        mine = np.array([other == kind for other in kinds])
        found[kind] = {
            "prompts": int(mine.sum()),
            "dropped_mass": float(losses[mine].mean()),
            "tail": float(tails[mine].mean()),
        }
    return found


def _check_reuse(params: SelectorParams, measured: list[_Measurement]) -> None:
    time = params.time
    can_share = time is not None and bool(((time.gate > 0) & (time.block > 1)).any())
    if can_share and any(m.contested for m in measured) and not any(m.reused for m in measured):
        raise InputError("no decode step reused a set, so sharing was not tested; use longer or more prompts")


def _total_variation(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    gap = dense.float().softmax(-1) - sparse.float().softmax(-1)
    return float(gap.clamp(min=0).sum(-1).mean())


def _fano_of(delta: float, prompts: list[corpus.Prompt]) -> float:
    queries = max(len(p.input_ids) - p.prefill_length for p in prompts)
    return float(fano_envelope(delta, queries, max(len(p.input_ids) for p in prompts)))

"""Calibration: fit the schedules on one split, choose λ on another, write what was found into a bundle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prhs_calibration import corpus, fit, memory, risk
from prhs_calibration.bundle import Bundle
from prhs_calibration.bundle_format import BundleMetadata
from prhs_calibration.corpus import Prompt
from prhs_calibration.models import LoadedModel
from prhs_calibration.profile import DECODE_STEPS, Progress, closed_loop_losses, observe
from prhs_calibration.statistics import DepthStatistics, TimeStatistics
from prhs_kernels.errors import UsageError
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams, SelectorParams, TimeParams
from prhs_kernels.runtime.attach import dense_params

AXES = ("time", "depth", "layer")
AXIS_SHARE = 0.1  # of δ, what depth and layer may each cost on their own
NUM_SINKS, NUM_LOCAL = 4, 16
AXIS_PROMPTS = 12  # of the fit split, to check a depth or layer schedule in closed loop
DOES_NOT_PAY = (
    f"no schedule drops {fit.MIN_FRACTION:.0%} of the positions, averaged over layers, "
    f"for {AXIS_SHARE:.0%} of delta"
)


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
    axes: Sequence[str] | frozenset[str] = AXES,
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
        target: "expected" or "high-probability" (docs/guarantees.md).

    Raises:
        UsageError: δ outside (0, 1), unknown axis, or too few prompts for this δ.
        InputError: text that does not fill the prompts.
    """
    _check(delta, num_prompts, axes, target, confidence)
    report = progress or (lambda stage, done, total: None)
    length = min(context_length or loaded.context_length, loaded.context_length)
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
    fitted = _Fit(loaded, prompts["fit"], delta, num_prompts, base, report).run(axes)
    losses = closed_loop_losses(
        loaded.model,
        prompts["select"],
        fitted.settings,
        lambda done, total: report("risk curve", done, total),
    )
    choice = risk.choose_dial(losses, delta, target, confidence)
    metadata = BundleMetadata(
        model_id=loaded.model_id,
        revision=loaded.revision,
        fingerprint=loaded.fingerprint,
        weights_hash=loaded.weights_hash,
        tokenizer_hash=loaded.tokenizer_hash,
        corpus_hash=corpus.corpus_hash([*prompts["fit"], *prompts["select"]]),
        seeds={"corpus": seed},
        split_sizes={**{str(split): size for split, size in sizes.items()}, "verify": 0},
        context_length=length,
        delta=delta,
        dial_index=choice.index,
        target=target,
        confidence=confidence,
        num_sinks=NUM_SINKS,
        num_local=NUM_LOCAL,
        freeze_mode=fitted.freeze_mode.name.lower(),
        library_versions=_versions(),
        report={**fitted.report, "corpus": "given" if sources else "built-in"},
    )
    bundle = Bundle(metadata, {**fitted.tensors(), "risk/loss": torch.tensor(losses, dtype=torch.float32)})
    return CalibrationOutcome(bundle, _summary(bundle, choice, fitted))


def estimate_cost(
    config: Any,
    *,
    num_prompts: int,
    fit_prompts: int | None = None,
    context_length: int,
    dtype: torch.dtype = torch.bfloat16,
    decode_steps: int = DECODE_STEPS,
) -> Cost:
    """Tokens, FLOPs and peak memory of a calibration, for `--dry-run`; counts the built-in prompts as full
    length.

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


@dataclasses.dataclass
class _Fit:
    """Everything that looks at the fit split."""

    loaded: LoadedModel
    prompts: list[Prompt]
    delta: float
    num_select: int  # prompts of the selection split
    base: SelectorParams
    progress: Progress

    def run(self, axes: Sequence[str] | frozenset[str]) -> _Fit:
        shape = self.base
        self.report: dict[str, Any] = {"axes": {}}
        self.freeze_mode = FreezeMode.SHARE
        self.profile: dict[str, np.ndarray] = {}
        self.schedules: dict[str, fit.Schedule] = {}
        if "depth" in axes or "layer" in axes:
            depth = DepthStatistics(shape.num_layers, shape.num_sinks, shape.num_local)
            self._observe("depth profile", shape, depth.add)
            self.profile.update(
                window_loss=depth.window_loss, share_loss=depth.share_loss, similarity=depth.similarity
            )
        self.params = shape
        if "depth" in axes:
            self._fit_depth()
        if "layer" in axes:
            self._fit_layer()
        time = TimeStatistics(shape.num_layers, shape.num_kv_heads, shape.num_sinks, shape.num_local)
        self._observe("time profile", self.params, time.add)
        self.profile["cosine"] = time.cosine
        if "time" in axes:
            self.dial = fit.fit_dial(time, self.delta, fit.dial_targets(self.delta, self.num_select))
        else:
            self.dial = fit.dense_dial(time)
        return self

    def _observe(self, stage: str, params: SelectorParams, observer: Any) -> None:
        observe(
            self.loaded.model,
            self.prompts,
            params,
            [observer],
            lambda done, total: self.progress(stage, done, total),
        )

    def _closed_loop(self, stage: str, params: SelectorParams) -> float:
        losses = closed_loop_losses(
            self.loaded.model,
            self.prompts[:AXIS_PROMPTS],
            [params],
            lambda done, total: self.progress(stage, done, total),
        )
        return float(losses.mean())

    def _fit_depth(self) -> None:
        schedule = fit.fit_schedule(self.profile["window_loss"], AXIS_SHARE * self.delta)

        def params(candidate: fit.Schedule) -> SelectorParams:
            return dataclasses.replace(self.params, depth=DepthParams(candidate.start_layer, candidate.base))

        self._settle("depth", schedule, params)

    def _fit_layer(self) -> None:
        schedule = fit.fit_schedule(self.profile["share_loss"], AXIS_SHARE * self.delta)
        if schedule is not None:
            modes = {
                mode: self._closed_loop("layer check", self._frozen(schedule, mode)) for mode in FreezeMode
            }
            self.freeze_mode = min(modes, key=lambda mode: modes[mode])
        self._settle("layer", schedule, lambda candidate: self._frozen(candidate, self.freeze_mode))

    def _frozen(self, schedule: fit.Schedule, mode: FreezeMode) -> SelectorParams:
        layer = LayerParams(schedule.start_layer, schedule.base, mode=mode)
        return dataclasses.replace(self.params, layer=layer)

    def _settle(self, axis: str, schedule: fit.Schedule | None, params: Any) -> None:
        """Weaken a schedule until it costs at most its share of δ in closed loop, on top of the axes
        before."""
        before = 0.0 if self.params.is_dense else self._closed_loop(f"{axis} check", self.params)
        allowed = before + AXIS_SHARE * self.delta
        while schedule is not None and schedule.pays(self.base.num_layers):
            loss = self._closed_loop(f"{axis} check", params(schedule))
            if loss <= allowed:
                break
            schedule = schedule.weakened(0.5)
        if schedule is None or not schedule.pays(self.base.num_layers):
            self.report["axes"][axis] = {"on": False, "why": DOES_NOT_PAY}
            return
        self.params = params(schedule)
        self.schedules[axis] = schedule
        self.report["axes"][axis] = {
            "on": True,
            "start_layer": schedule.start_layer,
            "base": schedule.base,
            "misfit": schedule.misfit,
            "fractions": schedule.fractions(self.base.num_layers).tolist(),
            "closed_loop_loss": loss - before,
        }

    @property
    def settings(self) -> list[SelectorParams]:
        """Selector parameters of every dial point; the last is dense."""
        points = [
            dataclasses.replace(self.params, time=self._time(index))
            for index in range(len(self.dial.lam) - 1)
        ]
        return [*points, self.base]

    def _time(self, index: int) -> TimeParams:
        ratio = torch.tensor(self.dial.budget_ratio[index], dtype=torch.float32)
        gates = self._gates()
        return TimeParams(
            budget_ratio=ratio,
            budget_tokens=torch.zeros_like(ratio, dtype=torch.int32),
            gate=gates["gate"],
            tau_cos=gates["tau_cos"],
            block=gates["block"],
            dilation=gates["dilation"],
        )

    def _gates(self) -> dict[str, torch.Tensor]:
        def table(field: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([[getattr(s, field) for s in row] for row in self.dial.setting], dtype=dtype)

        return {
            "gate": table("gate", torch.uint8),
            "tau_cos": table("tau_cos", torch.float32),
            "block": table("block", torch.int32),
            "dilation": table("dilation", torch.int32),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the bundle but the risk curve."""
        ratio = torch.tensor(self.dial.budget_ratio, dtype=torch.float32)
        tensors = {
            "time/lambda": torch.tensor(self.dial.lam, dtype=torch.float32),
            "time/budget_ratio": ratio,
            "time/budget_tokens": torch.zeros_like(ratio, dtype=torch.int32),
            **{f"time/{name}": table for name, table in self._gates().items()},
            "profile/predicted_loss": torch.tensor(self.dial.loss, dtype=torch.float32),
            "profile/predicted_cost": torch.tensor(self.dial.cost, dtype=torch.float32),
        }
        tensors.update(
            {f"profile/{name}": torch.tensor(value).float() for name, value in self.profile.items()}
        )
        for axis, schedule in self.schedules.items():
            tensors[f"{axis}/schedule"] = torch.tensor([schedule.start_layer, schedule.base, 1.0])
        return tensors


def _check(
    delta: float, num_prompts: int, axes: Sequence[str] | frozenset[str], target: str, confidence: float
) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"delta = {delta} must lie between 0 and 1, both excluded")
    unknown = sorted(set(axes) - set(AXES))
    if unknown or not axes:
        raise UsageError(f"axes = {', '.join(unknown) or 'none'}: choose from {', '.join(AXES)}")
    needed = risk.prompts_needed(delta, target, confidence)
    if num_prompts < needed:
        raise UsageError(
            f"{num_prompts} prompts cannot promise delta = {delta} ({target}): at least {needed} are needed; "
            "give more prompts or a larger delta"
        )


def _versions() -> dict[str, str]:
    names = ("prhs", "torch", "transformers", "numpy", "scipy", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return {**found, "python": platform.python_version()}


def _summary(bundle: Bundle, choice: risk.DialChoice, fitted: _Fit) -> dict[str, Any]:
    index = choice.index
    sharing = [s for row in fitted.dial.setting for s in row if s.gate]
    return {
        "model": bundle.metadata.model_id,
        "delta": choice.delta,
        "target": str(choice.target),
        "prompts": bundle.metadata.split_sizes,
        "lambda": float(bundle.dial[index]),
        "dial_index": index,
        "dial_points": len(bundle.dial),
        "risk": choice.risk,
        "risk_bound": choice.evidence,
        "predicted_cost": float(fitted.dial.cost[index]),
        "heads_that_share": len(sharing),
        "heads": sum(len(row) for row in fitted.dial.setting),
        "axes": fitted.report["axes"],
    }

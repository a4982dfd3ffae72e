"""Fit split -> the family of settings along the dial: profiles the model, fits all three axes, checks them.

Nothing here sees a prompt of another split; which λ of the family is used is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prhs_calibration import fit
from prhs_calibration.corpus import Prompt
from prhs_calibration.key_copies import KeyCopyStatistics, Scan, kinds_to_compare
from prhs_calibration.profile import Progress, closed_loop_losses, observe
from prhs_calibration.statistics import DepthStatistics, TimeStatistics
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams, SelectorParams

AXES = ("time", "depth", "layer")
AXIS_SHARE = 0.1  # of δ, what depth and layer may each cost on their own
AXIS_PROMPTS = 12  # of the fit split, to check a depth or layer schedule in closed loop
DOES_NOT_PAY = (
    f"no schedule drops {fit.MIN_FRACTION:.0%} of the positions, averaged over layers, "
    f"for {AXIS_SHARE:.0%} of delta"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Settings along the dial.

    tensors: everything of the bundle but the risk curve; report: what was decided about each axis and why.
    """

    dial: fit.Dial
    tensors: dict[str, torch.Tensor]
    freeze_mode: FreezeMode
    report: dict[str, Any]


def fit_family(
    model: PreTrainedModel,
    prompts: list[Prompt],
    *,
    delta: float,
    num_select: int,
    base: SelectorParams,
    axes: Collection[str],
    key_copy: str,
    progress: Progress,
) -> Family:
    """Fit the axes one after another, each on top of those before: depth, layer, then time.

    Args:
        num_select: prompts that λ will be chosen on; the dial is finest where so many can decide.
        base: the model's shape, sinks and local positions, every axis off.
        key_copy: what retrievals scan, or "auto": the kind that is predicted to read the fewest bytes.
    """
    stages = _Stages(model, prompts, delta, base, progress)
    if "depth" in axes or "layer" in axes:
        stages.profile_depth()
    if "depth" in axes:
        stages.fit_depth()
    if "layer" in axes:
        stages.fit_layer()
    time, scans = stages.profile_time(kinds_to_compare(key_copy if "time" in axes else "exact"))
    if "time" in axes:
        targets, admitted = fit.dial_targets(delta, num_select), fit.admitted_loss(delta, num_select)
        dials = [fit.fit_dial(time, scan, delta, targets) for scan in scans]
        dial = min(dials, key=lambda found: found.cost_at(admitted))
        report = [_scan_report(found, admitted) for found in dials]
    else:
        dial, report = fit.dense_dial(time, scans[0]), []
    tensors = {**_dial_tensors(dial), **stages.tensors()}
    return Family(dial, tensors, stages.freeze_mode, {"axes": stages.report, "key_copies": report})


def _scan_report(dial: fit.Dial, admitted: float) -> dict[str, Any]:
    return {
        "kind": dial.scan.kind.value,
        "scan_row": dial.scan.row,
        "recall": dial.scan.mean_recall,
        "predicted_cost": dial.cost_at(admitted),
    }


class _Stages:
    """The fits so far: `params` has the axes that are on, the rest is for the bundle."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[Prompt],
        delta: float,
        base: SelectorParams,
        progress: Progress,
    ) -> None:
        self.model, self.prompts, self.progress = model, prompts, progress
        self.allowance = AXIS_SHARE * delta
        self.params = base
        self.freeze_mode = FreezeMode.SHARE
        self.report: dict[str, Any] = {}
        self.profile: dict[str, np.ndarray] = {}
        self.schedules: dict[str, fit.Schedule] = {}

    def profile_depth(self) -> None:
        """Window and sharing losses of the dense model."""
        base = self.params
        statistics = DepthStatistics(base.num_layers, base.num_sinks, base.num_local)
        self._observe("depth profile", statistics.add)
        self.profile["window_loss"] = statistics.window_loss
        self.profile["share_loss"] = statistics.share_loss
        self.profile["similarity"] = statistics.similarity

    def profile_time(self, kinds: Sequence[KeyCopyKind]) -> tuple[TimeStatistics, list[Scan]]:
        """Sharing and truncation losses of the model with the axes that are on, and what key copies do."""
        base = self.params
        statistics = TimeStatistics(base.num_layers, base.num_kv_heads, base.num_sinks, base.num_local)
        copies = KeyCopyStatistics(base, kinds)
        self._observe("time profile", statistics.add, copies.add)
        self.profile["cosine"] = statistics.cosine
        return statistics, copies.scans()

    def fit_depth(self) -> None:
        """PSAW."""
        schedule = fit.fit_schedule(self.profile["window_loss"], self.allowance)

        def windowed(candidate: fit.Schedule) -> SelectorParams:
            return dataclasses.replace(self.params, depth=DepthParams(candidate.start_layer, candidate.base))

        self._settle("depth", schedule, windowed)

    def fit_layer(self) -> None:
        """ETF, with the source of frozen keys that loses less."""
        schedule = fit.fit_schedule(self.profile["share_loss"], self.allowance)

        def frozen(candidate: fit.Schedule) -> SelectorParams:
            layer = LayerParams(candidate.start_layer, candidate.base, mode=self.freeze_mode)
            return dataclasses.replace(self.params, layer=layer)

        if schedule is not None:
            losses = {}
            for mode in FreezeMode:
                self.freeze_mode = mode
                losses[mode] = self._closed_loop("layer check", frozen(schedule))
            self.freeze_mode = min(losses, key=lambda mode: losses[mode])
        self._settle("layer", schedule, frozen)

    def _settle(
        self, axis: str, schedule: fit.Schedule | None, on: Callable[[fit.Schedule], SelectorParams]
    ) -> None:
        """Weaken a schedule until it costs at most its share of δ in closed loop, beyond the axes before."""
        num_layers, loss = self.params.num_layers, 0.0
        before = 0.0 if self.params.is_dense else self._closed_loop(f"{axis} check", self.params)
        while schedule is not None and schedule.pays(num_layers):
            loss = self._closed_loop(f"{axis} check", on(schedule)) - before
            if loss <= self.allowance:
                break
            schedule = schedule.weakened(0.5)
        if schedule is None or not schedule.pays(num_layers):
            self.report[axis] = {"on": False, "why": DOES_NOT_PAY}
            return
        self.params = on(schedule)
        self.schedules[axis] = schedule
        self.report[axis] = {
            "on": True,
            "start_layer": schedule.start_layer,
            "base": schedule.base,
            "misfit": schedule.misfit,
            "fractions": schedule.fractions(num_layers).tolist(),
            "closed_loop_loss": loss,
        }

    def _observe(self, stage: str, *observers: Callable[[Any], None]) -> None:
        observe(self.model, self.prompts, self.params, observers, self._reporter(stage))

    def _closed_loop(self, stage: str, params: SelectorParams) -> float:
        some = self.prompts[:AXIS_PROMPTS]
        return float(closed_loop_losses(self.model, some, [params], self._reporter(stage)).mean())

    def _reporter(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Schedules that are on, and every profile."""
        tensors = {f"profile/{name}": torch.tensor(value).float() for name, value in self.profile.items()}
        for axis, schedule in self.schedules.items():
            tensors[f"{axis}/schedule"] = torch.tensor([schedule.start_layer, schedule.base, 1.0])
        return tensors


def _dial_tensors(dial: fit.Dial) -> dict[str, torch.Tensor]:
    ratio = torch.tensor(dial.budget_ratio, dtype=torch.float32)

    def gate(field: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[getattr(s, field) for s in row] for row in dial.setting], dtype=dtype)

    return {
        "time/lambda": torch.tensor(dial.lam, dtype=torch.float32),
        "time/budget_ratio": ratio,
        "time/budget_tokens": torch.zeros_like(ratio, dtype=torch.int32),
        "time/gate": gate("gate", torch.uint8),
        "time/tau_cos": gate("tau_cos", torch.float32),
        "time/block": gate("block", torch.int32),
        "time/dilation": gate("dilation", torch.int32),
        "profile/predicted_loss": torch.tensor(dial.loss, dtype=torch.float32),
        "profile/predicted_tail": torch.tensor(dial.tail, dtype=torch.float32),
        "profile/key_copy_recall": torch.tensor(dial.scan.recall, dtype=torch.float32),
        "profile/predicted_cost": torch.tensor(dial.cost, dtype=torch.float32),
    }

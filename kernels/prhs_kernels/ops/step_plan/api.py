"""Spans, budgets and places of one decode step, for all layers at once."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.step_plan import reference
from prhs_kernels.params import SelectorParams

NO_WINDOW = 2**31 - 1  # a sliding window that nothing leaves


@dataclasses.dataclass(frozen=True, eq=False)
class PlanRule:
    """What the plan of a step follows from, on the device.

    fraction: `[layers]` float64, PSAW's share of old positions. window: `[layers]` int64, the model's own
    sliding window in positions. ratio, tokens: `[layers, num_kv_heads]` float64 and int64, CIS budgets; a
    ratio of 1 keeps everything. padding: `[batch]` int64, left padding. shift: `[layers]` int64, slots that
    the stored layer starts later; where it is not 0, each sequence's sinks stand in its first slots.
    """

    num_sinks: int
    num_local: int
    fraction: torch.Tensor
    window: torch.Tensor
    ratio: torch.Tensor
    tokens: torch.Tensor
    padding: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def create(
        cls, params: SelectorParams, windows: list[int | None], batch: int, device: torch.device
    ) -> PlanRule:
        """For sequences without padding and layers that are stored whole; both are changed in place."""
        layers, depth, time = params.num_layers, params.depth, params.time
        heads = (layers, params.num_kv_heads)
        old = [0.0 if depth is None else depth.window_fraction(layer, layers) for layer in range(layers)]
        ratio = torch.ones(heads) if time is None else time.budget_ratio
        tokens = torch.zeros(heads) if time is None else time.budget_tokens
        return cls(
            num_sinks=params.num_sinks,
            num_local=params.num_local,
            fraction=torch.tensor(old, dtype=torch.float64, device=device),
            window=torch.tensor([NO_WINDOW if w is None else w for w in windows], device=device),
            ratio=ratio.to(device).double().contiguous(),
            tokens=tokens.to(device).long().contiguous(),
            padding=torch.zeros(batch, dtype=torch.long, device=device),
            shift=torch.zeros(layers, dtype=torch.long, device=device),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """One decode step.

    positions: `[batch]` int32 of the new token. slots: `[layers, batch]` int32, where its key goes.
    spans: `[layers, batch, 4]` int32, see `ops.spans`. visible: `[layers, batch]` int32, positions that dense
    attention covers. budget: `[layers, batch, num_kv_heads]` int32, as `selectors.cis.middle_budget`.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    spans: torch.Tensor
    visible: torch.Tensor
    budget: torch.Tensor


def step_plan(slot: torch.Tensor, rule: PlanRule, *, backend: Backend = "auto") -> StepPlan:
    """The step whose token stands at `slot` of the padded batch; nothing is read back by the host.

    Args:
        slot: `[1]` int64, before any shift.

    Raises:
        UsageError: shapes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_shape("slot", slot, (1,))
    layers, heads = rule.ratio.shape
    for name, shape, dtype in (
        ("fraction", (layers,), torch.float64),
        ("window", (layers,), torch.int64),
        ("ratio", (layers, heads), torch.float64),
        ("tokens", (layers, heads), torch.int64),
        ("padding", (None,), torch.int64),
        ("shift", (layers,), torch.int64),
    ):
        check_shape(f"rule.{name}", getattr(rule, name), shape)
        check_like(f"rule.{name}", getattr(rule, name), slot, (dtype,))
    if not use_triton(backend, slot):
        return StepPlan(*reference.step_plan(slot, rule))
    from prhs_kernels.ops.step_plan import triton as kernel

    return StepPlan(*kernel.step_plan(slot, rule))

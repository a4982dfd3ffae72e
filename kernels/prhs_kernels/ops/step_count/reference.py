"""Counting in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prhs_kernels.ops.retrieve.state import Decision
from prhs_kernels.params import Gate

if TYPE_CHECKING:
    from prhs_kernels.ops.step_count.api import ChosenSets
    from prhs_kernels.ops.step_plan.api import StepPlan


def step_count(
    totals: torch.Tensor,
    plan: StepPlan,
    alive: torch.Tensor,
    sets: ChosenSets | None,
    group: int,
    scan_row: float,
) -> None:
    """Arguments as in `api.step_count`."""
    first, sink_end, begin, end = plan.spans.long().unbind(dim=-1)
    candidates = (sink_end - first + end - begin)[..., None].expand(plan.budget.shape)
    visible = plan.visible[..., None].expand(plan.budget.shape)
    kept = candidates.clone()
    retrieved, contested = torch.zeros_like(kept), torch.zeros_like(kept)
    scanned = kept.new_zeros(kept.shape, dtype=torch.float64)
    if sets is not None:
        layers = (sets.place >= 0).nonzero().squeeze(-1)
        shape = (layers.numel(), *plan.budget.shape[1:])
        decision, anchor = sets.state.decision.view(shape), sets.anchor.view(shape)
        chose, fetched = decision != int(Decision.KEEP_ALL), decision == int(Decision.RETRIEVE)
        since = plan.slots[layers][..., None] - anchor
        asked = (anchor >= 0) & (since < sets.block[:, None]) & (sets.gate != int(Gate.NEVER))[:, None]
        kept[layers] = torch.where(chose, _inside(plan.spans[layers], sets, shape), kept[layers])
        retrieved[layers], contested[layers] = fetched.long(), chose.long()
        scanned[layers] = (
            scan_row * (fetched * candidates[layers]).double() + group * (chose & asked).double()
        )
    units = torch.ones_like(kept)
    fields = (units, kept, kept.double() / visible, visible, retrieved, contested, 2 * kept + scanned)
    counted = torch.stack([field.double().sum(dim=-1) for field in fields], dim=-1)
    totals.add_(counted * alive[:, None])


def _inside(spans: torch.Tensor, sets: ChosenSets, shape: tuple[int, ...]) -> torch.Tensor:
    """Indices of every set that are still inside the spans, `[places, batch, num_kv_heads]`."""
    indices, count = sets.state.indices.view(*shape, -1), sets.state.count.view(shape)
    first, sink_end, window = (spans[..., i, None, None] for i in range(3))
    used = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    inside = (indices >= window) | ((indices >= first) & (indices < sink_end))
    return (used & inside).sum(dim=-1)

"""The plan of a decode step in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from prhs_kernels.ops.step_plan.api import PlanRule


def step_plan(slot: torch.Tensor, rule: PlanRule) -> tuple[torch.Tensor, ...]:
    """Arguments as in `api.step_plan`; the fields of `StepPlan` in order."""
    layers, batch = rule.window.shape[0], rule.padding.shape[0]
    padding, window, shift = rule.padding, rule.window[:, None], rule.shift[:, None]
    end, position = slot + 1, slot - padding
    visible = torch.minimum(position + 1, window)
    first = torch.maximum(padding, end - window)
    sink_end = torch.minimum(torch.maximum(padding + rule.num_sinks, first), end)
    start = (position.double() * rule.fraction[:, None]).floor().long()
    begin = torch.maximum(sink_end, torch.minimum(padding + start, end - rule.num_local))
    sinks = [
        torch.where(shift > 0, (edge - padding).clamp(max=rule.num_sinks), edge) for edge in (first, sink_end)
    ]
    slots = (slot - shift).expand(layers, batch)
    spans = torch.stack([*sinks, begin - shift, slots + 1], dim=-1)
    seen, ratio = visible[..., None], rule.ratio[:, None]
    budget = torch.where(ratio >= 1, seen, (ratio * seen).floor().long() + rule.tokens[:, None])
    return position.int(), slots.int(), spans.int(), visible.int(), budget.int()

"""One program per layer and sequence; float64, so that a budget is the same number everywhere."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from prhs_kernels.ops.step_plan.api import PlanRule


@triton.jit
def step_plan_kernel(
    slot_ptr,  # [1]
    padding_ptr,  # [batch]
    fraction_ptr,  # [layers]
    window_ptr,  # [layers]
    shift_ptr,  # [layers]
    ratio_ptr,  # [layers, heads]
    tokens_ptr,
    positions_ptr,  # [batch]
    slots_ptr,  # [layers, batch]
    spans_ptr,  # [layers, batch, 4]
    visible_ptr,  # [layers, batch]
    budget_ptr,  # [layers, batch, heads]
    batch,
    heads,
    num_sinks,
    num_local,
    BLOCK_H: tl.constexpr,
):
    layer, row = tl.program_id(0), tl.program_id(1)
    slot, padding = tl.load(slot_ptr), tl.load(padding_ptr + row)
    window, shift = tl.load(window_ptr + layer), tl.load(shift_ptr + layer)
    end, position = slot + 1, slot - padding
    visible = tl.minimum(position + 1, window)
    first = tl.maximum(padding, end - window)
    sink_end = tl.minimum(tl.maximum(padding + num_sinks, first), end)
    # not negative: cutting off the fraction is floor
    start = (position.to(tl.float64) * tl.load(fraction_ptr + layer)).to(tl.int64)
    begin = tl.maximum(sink_end, tl.minimum(padding + start, end - num_local))
    if shift > 0:
        first = tl.minimum(first - padding, num_sinks)
        sink_end = tl.minimum(sink_end - padding, num_sinks)
    at = layer * batch + row
    tl.store(spans_ptr + at * 4, first.to(tl.int32))
    tl.store(spans_ptr + at * 4 + 1, sink_end.to(tl.int32))
    tl.store(spans_ptr + at * 4 + 2, (begin - shift).to(tl.int32))
    tl.store(spans_ptr + at * 4 + 3, (end - shift).to(tl.int32))
    tl.store(slots_ptr + at, (slot - shift).to(tl.int32))
    tl.store(visible_ptr + at, visible.to(tl.int32))
    if layer == 0:
        tl.store(positions_ptr + row, position.to(tl.int32))
    offs = tl.arange(0, BLOCK_H)
    mask = offs < heads
    ratio = tl.load(ratio_ptr + layer * heads + offs, mask=mask, other=0.0)
    tokens = tl.load(tokens_ptr + layer * heads + offs, mask=mask, other=0)
    budget = (ratio * visible.to(tl.float64)).to(tl.int64) + tokens
    budget = tl.where(ratio >= 1.0, visible, budget)
    tl.store(budget_ptr + at * heads + offs, budget.to(tl.int32), mask=mask)


def step_plan(slot: torch.Tensor, rule: PlanRule) -> tuple[torch.Tensor, ...]:
    """Launch; arguments as in `api.step_plan`, the fields of `StepPlan` in order."""
    (layers, heads), batch = rule.ratio.shape, rule.padding.shape[0]

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=slot.device)

    out = (
        made(batch),
        made(layers, batch),
        made(layers, batch, 4),
        made(layers, batch),
        made(layers, batch, heads),
    )
    step_plan_kernel[(layers, batch)](
        slot,
        rule.padding,
        rule.fraction,
        rule.window,
        rule.shift,
        rule.ratio,
        rule.tokens,
        *out,
        batch,
        heads,
        rule.num_sinks,
        rule.num_local,
        BLOCK_H=triton.next_power_of_2(heads),
        num_warps=1,
    )
    return out

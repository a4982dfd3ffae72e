"""One program per layer and sequence, its KV heads side by side; no atomics, so the sums are repeatable."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous

if TYPE_CHECKING:
    from prhs_kernels.ops.step_count.api import ChosenSets
    from prhs_kernels.ops.step_plan.api import StepPlan


@triton.jit
def count_below(idx_ptrs, count, bounds, mask):
    """How many of the ascending indices behind each pointer are below each bound, `[bounds, pointers]`.

    All searches go on together: a step of one is a load that the next step waits for.
    """
    high = tl.where(mask[None, :], count[None, :], 0) + bounds[:, None] * 0
    low = tl.zeros_like(high)
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        open = low < high
        below = tl.load(idx_ptrs[None, :] + middle, mask=open, other=0) < bounds[:, None]
        low = tl.where(open & below, middle + 1, low)
        high = tl.where(open & ~below, middle, high)
    return low


@triton.jit
def step_count_kernel(
    totals_ptr,  # [layers, batch, 7]
    spans_ptr,  # [layers, batch, 4]
    visible_ptr,  # [layers, batch]
    alive_ptr,  # [batch]
    place_ptr,  # [layers]
    gate_ptr,  # [places, heads]
    block_ptr,
    anchor_ptr,  # [places, batch, heads]
    decision_ptr,
    count_ptr,
    idx_ptr,  # [places, batch, heads, capacity]
    batch,
    heads,
    capacity,
    group,
    scan_top,  # rows that a scanned position costs: scan_top / scan_bottom
    scan_bottom,
    HAS_SETS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    layer, row = tl.program_id(0), tl.program_id(1)
    at = layer * batch + row
    offs = tl.arange(0, BLOCK_H)
    mask = offs < heads
    first, sink_end = tl.load(spans_ptr + at * 4), tl.load(spans_ptr + at * 4 + 1)
    begin, end = tl.load(spans_ptr + at * 4 + 2), tl.load(spans_ptr + at * 4 + 3)
    visible = tl.load(visible_ptr + at)
    candidates = sink_end - first + end - begin
    kept = tl.where(mask, candidates, 0)
    retrieved, contested, asked = tl.zeros_like(kept), tl.zeros_like(kept), tl.zeros_like(kept)
    if HAS_SETS:
        place = tl.load(place_ptr + layer)
        if place >= 0:
            rule, heads_at = place * heads + offs, (place * batch + row).to(tl.int64) * heads + offs
            decision = tl.load(decision_ptr + heads_at, mask=mask, other=2)
            anchor = tl.load(anchor_ptr + heads_at, mask=mask, other=-1)
            count = tl.load(count_ptr + heads_at, mask=mask, other=0)
            # inside are those from `begin` on, and of the others those from `first` to `sink_end`
            which = tl.arange(0, 4)
            bounds = tl.where(which == 0, begin, tl.where(which == 1, sink_end, first))
            below = count_below(idx_ptr + heads_at * capacity, count, bounds, mask)
            sign = tl.where(which == 1, 1, tl.where(which == 3, 0, -1))
            inside = count + tl.sum(below * sign[:, None], axis=0)
            chose = mask & (decision != 2)
            fetched = mask & (decision == 1)
            gated = (anchor >= 0) & (end - 1 - anchor < tl.load(block_ptr + rule, mask=mask, other=0))
            gated = gated & chose & (tl.load(gate_ptr + rule, mask=mask, other=0) != 0)
            kept = tl.where(chose, inside, kept)
            retrieved, contested, asked = fetched.to(tl.int32), chose.to(tl.int32), gated.to(tl.int32)
    if tl.load(alive_ptr + row) != 0:
        total = tl.sum(kept, axis=0).to(tl.float64)
        ptr = totals_ptr + at * 7
        tl.store(ptr, tl.load(ptr) + heads)
        tl.store(ptr + 1, tl.load(ptr + 1) + total)
        share = tl.sum(kept.to(tl.float64) / visible.to(tl.float64), axis=0)
        tl.store(ptr + 2, tl.load(ptr + 2) + share)
        tl.store(ptr + 3, tl.load(ptr + 3) + visible.to(tl.float64) * heads)
        tl.store(ptr + 4, tl.load(ptr + 4) + tl.sum(retrieved, axis=0))
        tl.store(ptr + 5, tl.load(ptr + 5) + tl.sum(contested, axis=0))
        scanned = (tl.sum(retrieved, axis=0) * candidates).to(tl.float64) * scan_top / scan_bottom
        rows_read = 2.0 * total + scanned + group * tl.sum(asked, axis=0)
        tl.store(ptr + 6, tl.load(ptr + 6) + rows_read)


def step_count(
    totals: torch.Tensor,
    plan: StepPlan,
    alive: torch.Tensor,
    sets: ChosenSets | None,
    group: int,
    scan_row: float,
) -> None:
    """Launch; arguments as in `api.step_count`."""
    layers, batch, heads = plan.budget.shape
    given = [totals] * 7
    capacity = 0
    if sets is not None:
        state, capacity = sets.state, sets.state.indices.shape[-1]
        given = [
            sets.place, sets.gate, sets.block, sets.anchor, state.decision, state.count, state.indices
        ]  # fmt: skip
    step_count_kernel[(layers, batch)](
        totals,
        plan.spans,
        plan.visible,
        alive,
        *given,
        batch,
        heads,
        capacity,
        group,
        *Fraction(scan_row).limit_denominator(4096).as_integer_ratio(),
        HAS_SETS=sets is not None,
        BLOCK_H=triton.next_power_of_2(heads),
        num_warps=1,
        **pdl_options(totals.device),
    )

"""Coins and dropped mass of a step: a program per layer, so that the order of the sums is always the same."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.audit.state import StepAudit
from prhs_kernels.ops.decode_config import next_power_of_2
from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous


@triton.jit
def draw_coins_kernel(
    coin_ptr,  # [layers, rows]
    seeds_ptr,  # [layers], int64
    step_ptr,  # [1], int64
    num_rows,
    limit,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    layer = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counter = (tl.load(step_ptr) * num_rows + rows).to(tl.int32)
    draw = tl.randint(tl.load(seeds_ptr + layer), counter).to(tl.int32, bitcast=True)
    falls = ((draw & 0x7FFFFFFF) <= limit).to(tl.int32)
    tl.store(coin_ptr + layer * num_rows + rows, falls, mask=rows < num_rows)


def draw_coins(audit: StepAudit) -> None:
    """Launch; see `api.draw_coins`."""
    layers, rows = audit.coin.shape[0], audit.coin[0].numel()
    block = min(128, next_power_of_2(rows))
    draw_coins_kernel[(layers, triton.cdiv(rows, block))](
        audit.coin, audit.seeds, audit.step, rows, audit.limit,
        BLOCK=block, num_warps=1, **pdl_options(audit.coin.device),
    )  # fmt: skip


@triton.jit
def dropped_mass(kept_ptr, whole_ptr, rows, mask, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Mean over the group, fp64; 0 where masked."""
    offs_g = tl.arange(0, BLOCK_G)
    at = rows[:, None] * GROUP + offs_g[None, :]
    inside = mask[:, None] & (offs_g[None, :] < GROUP)
    kept = tl.load(kept_ptr + at, mask=inside, other=0.0)
    whole = tl.load(whole_ptr + at, mask=inside, other=0.0)
    dropped = tl.where(inside, tl.maximum(1.0 - tl.exp(kept - whole), 0.0), 0.0)
    return tl.sum(dropped.to(tl.float64), axis=1) / GROUP


@triton.jit
def count_dropped_kernel(
    lse_kept_ptr,  # [layers, rows, GROUP]
    decision_ptr,  # [layers, rows]
    lse_ptr,  # [layers, rows, GROUP]
    audit_lse_ptr,  # [layers, rows, GROUP]
    coin_ptr,  # [layers, rows]
    alive_ptr,  # [batch]
    sums_ptr,  # [layers, 2], fp64
    units_ptr,  # [layers, 3], int64
    num_rows,
    num_kv_heads,
    EXACT: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    layer = tl.program_id(0)
    sums_ptr += 2 * layer
    units_ptr += 3 * layer
    certain_sum = tl.zeros([BLOCK_R], tl.float64)
    audited_sum = tl.zeros([BLOCK_R], tl.float64)
    units = tl.zeros([BLOCK_R], tl.int32)
    certain_units = tl.zeros([BLOCK_R], tl.int32)
    audited_units = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, num_rows, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        inside = place < num_rows
        if HAS_ALIVE:
            inside = inside & (tl.load(alive_ptr + place // num_kv_heads, mask=inside, other=0) != 0)
        rows = layer * num_rows + place
        decision = tl.load(decision_ptr + rows, mask=inside, other=2)
        coin = tl.load(coin_ptr + rows, mask=inside, other=0)
        certain = decision == 2
        if EXACT:
            retrieved = decision == 1
            certain = certain | retrieved
            certain_sum += dropped_mass(lse_kept_ptr, lse_ptr, rows, retrieved, GROUP, BLOCK_G)
        audited = (coin == 1) & (certain == 0)
        audited_sum += dropped_mass(lse_kept_ptr, audit_lse_ptr, rows, audited, GROUP, BLOCK_G)
        units += inside.to(tl.int32)
        certain_units += (certain & inside).to(tl.int32)
        audited_units += audited.to(tl.int32)
    certain_count = tl.sum(certain_units, axis=0)
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.sum(certain_sum, axis=0))
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + tl.sum(audited_sum, axis=0))
    tl.store(units_ptr, tl.load(units_ptr) + certain_count)
    tl.store(units_ptr + 1, tl.load(units_ptr + 1) + tl.sum(audited_units, axis=0))
    tl.store(units_ptr + 2, tl.load(units_ptr + 2) + tl.sum(units, axis=0) - certain_count)


def count_dropped(
    lse_kept: torch.Tensor, decision: torch.Tensor, lse: torch.Tensor, audit: StepAudit, exact: bool,
    alive: torch.Tensor | None,
) -> None:  # fmt: skip
    """Arguments as in `api.count_dropped`, already checked."""
    layers, rows, group = audit.coin.shape[0], audit.coin[0].numel(), lse.shape[-1]
    padded = next_power_of_2(group)
    count_dropped_kernel[(layers,)](
        lse_kept,
        decision,
        lse,
        audit.lse,
        audit.coin,
        audit.coin if alive is None else alive,
        audit.sums,
        audit.units,
        rows,
        decision.shape[1],
        EXACT=exact,
        HAS_ALIVE=alive is not None,
        GROUP=group,
        BLOCK_G=padded,
        BLOCK_R=min(next_power_of_2(rows), 512 // padded),
        num_warps=4,
        **pdl_options(lse.device),
    )

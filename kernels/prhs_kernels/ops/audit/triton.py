"""Dropped mass of a step: one program, so that the order of the sums is always the same."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.decode_config import next_power_of_2
from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous


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
    lse_kept_ptr,  # [rows, GROUP]
    decision_ptr,  # [rows]
    lse_ptr,  # [rows, GROUP]
    audit_lse_ptr,  # [rows, GROUP]
    coin_ptr,  # [rows]
    alive_ptr,  # [batch]
    sums_ptr,  # [2], fp64
    units_ptr,  # [3], int64
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
    certain_sum = tl.zeros([BLOCK_R], tl.float64)
    audited_sum = tl.zeros([BLOCK_R], tl.float64)
    units = tl.zeros([BLOCK_R], tl.int32)
    certain_units = tl.zeros([BLOCK_R], tl.int32)
    audited_units = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, num_rows, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        inside = rows < num_rows
        if HAS_ALIVE:
            inside = inside & (tl.load(alive_ptr + rows // num_kv_heads, mask=inside, other=0) != 0)
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
    lse_kept: torch.Tensor, decision: torch.Tensor, lse: torch.Tensor, audit: LayerAudit, exact: bool,
    alive: torch.Tensor | None,
) -> None:  # fmt: skip
    """Arguments as in `api.count_dropped`, already checked."""
    rows, group = decision.numel(), lse.shape[-1]
    padded = next_power_of_2(group)
    count_dropped_kernel[(1,)](
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

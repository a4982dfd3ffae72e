"""Coins, scans of what a window hides, and dropped mass of a step.

Masses are added up by a program per layer, so that the order of the sums is always the same.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.attention_tile.triton import LN_2
from prhs_kernels.ops.audit.state import LayerAudit, ScanScratch, StepAudit
from prhs_kernels.ops.decode_config import next_power_of_2, precision
from prhs_kernels.ops.launch_table import Tile
from prhs_kernels.ops.launch_table import tile as stored_tile
from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous
from prhs_kernels.ops.retrieve.config import scan_registers
from prhs_kernels.ops.retrieve.triton import load_query_for_keys, scan_rows
from prhs_kernels.ops.split_k.triton import assign, pick


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
def scan_units_kernel(
    q_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    coin_ptr,  # [rows]
    spans_ptr,  # [batch, 4]
    visible_ptr,  # [batch]
    count_ptr,  # [rows]
    decision_ptr,  # [rows]
    lse_ptr,  # [rows, GROUP]
    part_ptr,  # [2, rows, GROUP, PIECES], scratch, fp32: max and sum of exponentials
    counters_ptr,  # [rows], zeros: pieces that are done
    scale,
    num_kv_heads,
    num_rows,
    slots,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PIECES: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    rows = tl.arange(0, BLOCK_R)
    inside, sequence = rows < num_rows, rows // num_kv_heads
    seen = tl.load(visible_ptr + sequence, mask=inside, other=0)
    picked = tl.load(coin_ptr + rows, mask=inside, other=0) != 0
    if tl.program_id(0) == 0:
        if HAS_COUNT:
            kept = tl.load(count_ptr + rows, mask=inside, other=0)
        else:
            ptrs = spans_ptr + sequence * 4
            kept = tl.load(ptrs + 1, mask=inside, other=0) - tl.load(ptrs, mask=inside, other=0)
            kept += tl.load(ptrs + 3, mask=inside, other=0) - tl.load(ptrs + 2, mask=inside, other=0)
        tl.store(decision_ptr + rows, tl.where(kept == seen, 2, 0), mask=inside)
    tiles = tl.where(picked, tl.cdiv(seen, BLOCK_N), 0)
    place, begin, stop, size, wanted = assign(tiles, slots, tl.program_id(0), num_rows, BLOCK_R)
    if wanted:
        length, used = pick(rows, place, seen), tl.cdiv(pick(rows, place, tiles), size)
        row = place.to(tl.int64)
        batch, head = row // num_kv_heads, row % num_kv_heads
        first = tl.load(spans_ptr + batch * 4 + 3) - length
        query = load_query_for_keys(
            q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, PRECISION
        )
        max_ptr = part_ptr + row * GROUP * PIECES
        sum_ptr = max_ptr + num_rows * GROUP * PIECES
        scan_rows(  # keeps no scores
            query, k_ptr + batch * stride_kb + head * stride_kh, part_ptr, part_ptr, max_ptr + begin // size,
            sum_ptr + begin // size, scale, 0, 0, first, begin * BLOCK_N,
            tl.minimum(stop * BLOCK_N, length), False, 0, stride_kn, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D,
            BLOCK_N, PIECES, "exact", HEAD_DIM, BLOCK_D, PRECISION, LANES,
        )  # fmt: skip
        tl.debug_barrier()  # all threads have stored before one of them reports it
        if tl.atomic_add(counters_ptr + row, 1) == used - 1:
            tl.store(counters_ptr + row, 0)
            offs_g, offs_s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
            at, in_group = offs_g[:, None] * PIECES + offs_s[None, :], offs_g < GROUP
            mask = in_group[:, None] & (offs_s < used)[None, :]
            best = tl.load(max_ptr + at, mask=mask, other=-1e30)
            top = tl.max(best, axis=1)
            mass = tl.load(sum_ptr + at, mask=mask, other=0.0) * tl.exp2(best - top[:, None])
            lse = top + tl.log2(tl.sum(mass, axis=1))
            tl.store(lse_ptr + row * GROUP + offs_g, lse * LN_2, mask=in_group)


def scan_constants(head_dim: int, dtype: torch.dtype, rows: int, group: int, pieces: int, config: Tile):
    """Compile-time arguments of `scan_units`."""
    return {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK_G": next_power_of_2(group),
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_N": config.block_n,
        "BLOCK_R": next_power_of_2(rows),
        "BLOCK_S": next_power_of_2(pieces),
        "PIECES": pieces,
        "PRECISION": precision(dtype),
        "LANES": min(4, config.block_n // 16),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def scan_units(
    query: torch.Tensor, keys: torch.Tensor, audit: LayerAudit, spans: torch.Tensor, visible: torch.Tensor,
    decision: torch.Tensor, scale: float, count: torch.Tensor | None, scratch: ScanScratch,
) -> None:  # fmt: skip
    """Launch; arguments as in `api.scan_units`, already checked."""
    rows, group, pieces = scratch.parts.shape[1:]
    config = stored_tile("scan", keys.shape[3], keys.dtype, keys.device)
    slots = pieces - 1  # a head has what is left over besides
    query = query if query.stride(-1) == 1 else query.contiguous()
    scan_units_kernel[(slots + rows,)](
        query,
        keys,
        audit.coin,
        spans,
        visible,
        audit.coin if count is None else count,
        decision,
        audit.lse,
        scratch.parts,
        scratch.counters,
        scale,
        keys.shape[1],
        rows,
        slots,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        **scan_constants(keys.shape[3], keys.dtype, rows, group, pieces, config),
        HAS_COUNT=count is not None,
        maxnreg=scan_registers("exact", keys.dtype),
        **pdl_options(query.device),
    )


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
    lse_kept: torch.Tensor, audit: StepAudit, decision: torch.Tensor, lse: torch.Tensor | None,
    alive: torch.Tensor | None,
) -> None:  # fmt: skip
    """Arguments as in `api.count_dropped`, already checked."""
    layers, rows, group = audit.coin.shape[0], audit.coin[0].numel(), audit.lse.shape[-1]
    padded = next_power_of_2(group)
    count_dropped_kernel[(layers,)](
        lse_kept,
        decision,
        audit.lse if lse is None else lse,
        audit.lse,
        audit.coin,
        audit.coin if alive is None else alive,
        audit.sums,
        audit.units,
        rows,
        audit.coin.shape[2],
        EXACT=lse is not None,
        HAS_ALIVE=alive is not None,
        GROUP=group,
        BLOCK_G=padded,
        BLOCK_R=min(next_power_of_2(rows), 512 // padded),
        num_warps=4,
        **pdl_options(lse_kept.device),
    )

"""Split-K decode attention over gathered rows, the query group packed into one matrix product.

The tile of indices for the next iteration is carried through the loop: with `idx = load; k = load(idx)` in
one iteration the compiler keeps a single K and V buffer in flight, with the carried tile `num_stages - 1`.
A head's count is divided on the device into splits of a few tiles at least: one that keeps much gets many
programs, one that keeps little a few, and the programs left over end at once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prhs_kernels.ops.attention_tile.triton import (
    LOG2_E,
    attend_tile,
    finish,
    load_key_chunks,
    load_query_chunks,
    load_rows,
    state_buffers,
    store_nothing,
    store_state,
)
from prhs_kernels.ops.decode_config import DecodeConfig, gather_registers
from prhs_kernels.ops.overlap.triton import load_acquire, pdl_options, wait_for_previous


@triton.jit
def wait_unless_kept(count_ptr, decision_ptr):
    """The count of a row; waits for the kernel before only if that chooses the row's set.

    Both loads are under way at once. The first may not find a line that an earlier kernel left in L1; nor may
    what comes after the second, which acquires.
    """
    gdc_launch_dependents()
    count = tl.load(count_ptr, cache_modifier=".cg")
    if load_acquire(decision_ptr) == 1:
        gdc_wait()
        count = tl.load(count_ptr, cache_modifier=".cg")
    return count


@triton.jit
def sparse_decode_kernel(
    q_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    v_ptr,
    idx_ptr,  # [rows, max_kept], -1 is no row
    count_ptr,  # [rows]
    spans_ptr,  # [batch, 4]
    decision_ptr,  # [rows], 1: the kernel before chooses the row's set
    out_ptr,  # [batch, num_qo_heads, splits, HEAD_DIM]
    lse_ptr,  # [batch, num_qo_heads, splits]
    scale,
    num_kv_heads,
    max_kept,
    splits,
    least,  # tiles of a split, if there are that many
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if EARLY:
        count = tl.minimum(wait_unless_kept(count_ptr + row, decision_ptr + row).to(tl.int32), max_kept)
    else:
        wait_for_previous(PDL)
        count = max_kept
        if HAS_COUNT:
            count = tl.minimum(tl.load(count_ptr + row).to(tl.int32), max_kept)
    batch, head = row // num_kv_heads, row % num_kv_heads
    per_split = tl.maximum(tl.cdiv(tl.cdiv(count, BLOCK_N), splits), least) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, count)
    if (begin >= end) & (split > 0):
        store_nothing(lse_ptr, batch, head, split, splits, num_kv_heads * GROUP, GROUP, BLOCK_G)
    else:
        first, sink_end, window = 0, 0, 0
        if HAS_SPANS:
            first = tl.load(spans_ptr + batch * 4)
            sink_end = tl.load(spans_ptr + batch * 4 + 1)
            window = tl.load(spans_ptr + batch * 4 + 2)
        q = load_query_chunks(
            q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, PRECISION
        )
        k_ptr += batch * stride_kb + head * stride_kh
        v_ptr += batch * stride_vb + head * stride_vh
        idx_ptr += row * max_kept
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        offs_n = tl.arange(0, BLOCK_N)
        slots = tl.load(idx_ptr + begin + offs_n, mask=begin + offs_n < end, other=-1)
        for start in range(begin, end, BLOCK_N):
            ahead = start + BLOCK_N + offs_n
            following = tl.load(idx_ptr + ahead, mask=ahead < end, other=-1)
            valid = slots >= 0
            if HAS_SPANS:
                valid = valid & ((slots >= window) | ((slots >= first) & (slots < sink_end)))
            k = load_key_chunks(k_ptr, slots, valid, stride_kn, HEAD_DIM, BLOCK_D, PRECISION)
            v = load_rows(v_ptr, slots, valid, stride_vn, HEAD_DIM, BLOCK_D)
            best, total, acc = attend_tile(q, k, v, valid, best, total, acc, scale * LOG2_E, PRECISION)
            slots = following
        if PRECISION == "ieee":
            best *= scale * LOG2_E
        store_state(
            out_ptr, lse_ptr, batch, head, split, splits, num_kv_heads * GROUP, best, total, acc,
            HEAD_DIM, GROUP, BLOCK_G, BLOCK_D,
        )  # fmt: skip
    if EARLY:
        if (row == 0) & (split == 0):  # complete means that everything before is, for whoever waits for this
            gdc_wait()


def sparse_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    count: torch.Tensor | None,
    spans: torch.Tensor | None,
    scale: float,
    config: DecodeConfig,
    decision: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; arguments as in `api.sparse_decode`, already checked, index tensors contiguous."""
    num_kv_heads, max_kept = indices.shape[1:]
    part, lse, output = state_buffers(query, config.num_splits)
    overlap = pdl_options(query.device)
    sparse_decode_kernel[(query.shape[0] * num_kv_heads, config.num_splits)](
        query,
        keys,
        values,
        indices,
        count if count is not None else indices,
        spans if spans is not None else indices,
        decision if decision is not None else indices,
        part,
        lse,
        scale,
        num_kv_heads,
        max_kept,
        config.num_splits,
        config.least_tiles,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        **config.constants(query, num_kv_heads),
        HAS_COUNT=count is not None,
        HAS_SPANS=spans is not None,
        EARLY=overlap["PDL"] and decision is not None,
        maxnreg=gather_registers(query.dtype),
        **overlap,
    )
    return finish(part, lse, output, config.num_splits)

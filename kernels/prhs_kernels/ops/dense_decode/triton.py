"""Split-K decode attention over the sinks and the window of each sequence."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.attention_tile.triton import (
    LOG2_E,
    attend_tile,
    finish,
    load_key_chunks,
    load_query_chunks,
    load_rows,
    state_buffers,
    store_state,
)
from prhs_kernels.ops.decode_config import DecodeConfig, max_registers
from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous


@triton.jit
def load_spans(spans_ptr, batch, n, HAS_SPANS: tl.constexpr):
    """First sink slot, number of sinks, first window slot, number of slots in both."""
    if HAS_SPANS:
        first = tl.load(spans_ptr + batch * 4)
        sinks = tl.load(spans_ptr + batch * 4 + 1) - first
        window = tl.load(spans_ptr + batch * 4 + 2)
        total = sinks + tl.load(spans_ptr + batch * 4 + 3) - window
    else:
        first, sinks, window, total = 0, 0, 0, n
    return first, sinks, window, total


@triton.jit
def dense_decode_kernel(
    q_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    v_ptr,
    spans_ptr,  # [batch, 4]
    out_ptr,  # [batch, num_qo_heads, splits, HEAD_DIM]
    lse_ptr,  # [batch, num_qo_heads, splits]
    scale,
    num_kv_heads,
    n,
    splits,
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
    HAS_SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = row // num_kv_heads, row % num_kv_heads
    first, sinks, window, count = load_spans(spans_ptr, batch, n, HAS_SPANS)
    per_split = tl.cdiv(tl.cdiv(count, BLOCK_N), splits) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, count)

    q = load_query_chunks(
        q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, PRECISION
    )
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        valid = place < end
        slots = place
        if HAS_SPANS:
            slots = tl.where(place < sinks, first + place, window - sinks + place)
        k = load_key_chunks(k_ptr, slots, valid, stride_kn, HEAD_DIM, BLOCK_D, PRECISION)
        v = load_rows(v_ptr, slots, valid, stride_vn, HEAD_DIM, BLOCK_D)
        best, total, acc = attend_tile(q, k, v, valid, best, total, acc, scale * LOG2_E, PRECISION)
    if PRECISION == "ieee":
        best *= scale * LOG2_E
    store_state(
        out_ptr, lse_ptr, batch, head, split, splits, num_kv_heads * GROUP, best, total, acc,
        HEAD_DIM, GROUP, BLOCK_G, BLOCK_D,
    )  # fmt: skip


def dense_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor | None,
    scale: float,
    config: DecodeConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; arguments as in `api.dense_decode`, already checked."""
    num_kv_heads, n = keys.shape[1:3]
    splits = config.num_splits
    part, lse, output = state_buffers(query, splits)
    dense_decode_kernel[(query.shape[0] * num_kv_heads, splits)](
        query,
        keys,
        values,
        spans if spans is not None else lse,
        part,
        lse,
        scale,
        num_kv_heads,
        n,
        splits,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        **config.constants(query, num_kv_heads),
        HAS_SPANS=spans is not None,
        maxnreg=max_registers(config.num_warps),
        **pdl_options(query.device),
    )
    return finish(part, lse, output, splits)

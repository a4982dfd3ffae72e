"""Gate: who shares, who retrieves, who keeps everything, whom an audit scans; by the queries of a KV head.

An entry of the work list is `2 * row`, or `2 * row + 1` for an audit. Its header has the next free place, the
length for later stages and the chunks of a piece of the scan. No stage needs a reset in between: the scan
hands the length on, and the choice clears the counter for the next step.

The decision is a function of the queries in registers: the rotation that makes them takes it with it
(`ops/rope_append`), and the kernel here reads them. A query is held as its two halves, which RoPE turns.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prhs_kernels.ops.overlap.triton import post

HEADER = tl.constexpr(3)


@triton.jit
def load_parts(spans_ptr, batch, num_local):
    """First sink, number of sinks, first window slot, middle positions, end of the window."""
    first = tl.load(spans_ptr + batch * 4)
    sinks = tl.load(spans_ptr + batch * 4 + 1) - first
    window = tl.load(spans_ptr + batch * 4 + 2)
    end = tl.load(spans_ptr + batch * 4 + 3)
    return first, sinks, window, tl.maximum(end - num_local - window, 0), end


@triton.jit
def smallest_cosine(low, high, anchor_low, anchor_high, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of corresponding rows, both in halves `[BLOCK_G, BLOCK_H]`, in fp32."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    anchor_low, anchor_high = anchor_low.to(tl.float32), anchor_high.to(tl.float32)
    squares = tl.sum(low * low + high * high, axis=1)
    anchor_squares = tl.sum(anchor_low * anchor_low + anchor_high * anchor_high, axis=1)
    product = tl.sum(low * anchor_low + high * anchor_high, axis=1)
    cosine = product / tl.maximum(tl.sqrt(squares) * tl.sqrt(anchor_squares), 1e-30)
    # rounding may not take it above 1: a threshold of 1 means never
    return tl.minimum(tl.min(tl.where(tl.arange(0, BLOCK_G) < GROUP, cosine, 2.0), axis=0), 1.0)


@triton.jit
def keep_all(idx_ptr, count_ptr, count, first, sinks, window, end, capacity, BLOCK: tl.constexpr):
    """List every candidate. Where only the end has moved on since the last step, the newest is appended."""
    total = tl.minimum(sinks + end - window, capacity)
    # ascending slots whose ends are these, as many as there are between them, can only be the same set
    fits = (count == sinks + end - window - 1) & (count < capacity) & (count > sinks)
    if fits:
        fits = (tl.load(idx_ptr + sinks) == window) & (tl.load(idx_ptr + count - 1) == end - 2)
    if fits & (sinks > 0):
        fits = (tl.load(idx_ptr) == first) & (tl.load(idx_ptr + sinks - 1) == first + sinks - 1)
    begin = tl.where(fits, count, 0)
    for start in range(begin, total, BLOCK):
        place = start + tl.arange(0, BLOCK)
        slot = tl.where(place < sinks, first + place, window - sinks + place)
        tl.store(idx_ptr + place, slot, mask=place < total)
    tl.store(count_ptr, total)


@triton.jit
def enlist(work_ptr, entry):
    """Put an entry on the work list."""
    place = tl.atomic_add(work_ptr, 1)
    tl.store(work_ptr + HEADER + place, entry.to(tl.int32))


@triton.jit
def let_next_start(work_ptr, row):
    """Let the scan start, once nobody can take the length of the last step's list for that of this step's."""
    if row == 0:
        post(work_ptr + 1, 0)
    gdc_launch_dependents()


@triton.jit
def load_halves(ptrs, mask, HALF: tl.constexpr):
    """Tiles of the first and the second half of heads; zeros where masked."""
    low = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    return low, tl.load(ptrs + HALF, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def load_rule(
    row, num_kv_heads, spans_ptr, budget_ptr, gate_ptr, tau_ptr, block_ptr, anchor_query_ptr, anchor_slot_ptr,
    count_ptr, capacity, num_local,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What a decision rests on besides the queries: spans, who is contested, who may share, the anchor.

    The state is read from L2: `rope_append` asks before it waits, when L1 may hold an older one.
    """
    batch, head = row // num_kv_heads, row % num_kv_heads
    first, sinks, window, middle, end = load_parts(spans_ptr, batch, num_local)
    contested = tl.load(budget_ptr + row) < middle
    mode, tau = tl.load(gate_ptr + head), tl.load(tau_ptr + head)
    anchor_slot = tl.load(anchor_slot_ptr + row, cache_modifier=".cg")
    count = tl.load(count_ptr + row, cache_modifier=".cg")
    in_block = (anchor_slot >= 0) & (end - 1 - anchor_slot < tl.load(block_ptr + head))
    may_share = contested & in_block & (mode != 0) & (count < capacity)
    offs_g, offs = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    inside = (offs_g < GROUP)[:, None] & (offs < HEAD_DIM // 2)[None, :]
    anchor_ptrs = anchor_query_ptr + (row * GROUP + offs_g[:, None]) * HEAD_DIM + offs[None, :]
    low, high = load_halves(anchor_ptrs, inside, HEAD_DIM // 2)
    return first, sinks, window, end, contested, may_share, mode, tau, count, low, high


@triton.jit
def decide(
    low, high, known, coin, row, anchor_query_ptr, anchor_slot_ptr, idx_ptr, count_ptr, decision_ptr,
    work_ptr, capacity, AUDIT: tl.constexpr, COPY: tl.constexpr, HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide for a KV head by the halves of its queries `[BLOCK_G, BLOCK_H]` and what `load_rule` gave.

    coin: of its audit, any number without one.
    """
    first, sinks, window, end, contested, may_share, _, tau, count, anchor_low, anchor_high = known
    shares = may_share & (smallest_cosine(low, high, anchor_low, anchor_high, GROUP, BLOCK_G) > tau)
    idx_ptr += row * capacity
    if shares:
        tl.store(idx_ptr + count, end - 1)
        tl.store(count_ptr + row, count + 1)
        tl.store(decision_ptr + row, 0)
    elif contested:
        enlist(work_ptr, 2 * row)
        offs_g, offs = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
        inside = (offs_g < GROUP)[:, None] & (offs < HEAD_DIM // 2)[None, :]
        anchor_ptrs = anchor_query_ptr + (row * GROUP + offs_g[:, None]) * HEAD_DIM + offs[None, :]
        tl.store(anchor_ptrs, low, mask=inside)
        tl.store(anchor_ptrs + HEAD_DIM // 2, high, mask=inside)
        tl.store(anchor_slot_ptr + row, end - 1)
        tl.store(decision_ptr + row, 1)
    else:
        keep_all(idx_ptr, count_ptr + row, count, first, sinks, window, end, capacity, BLOCK)
        tl.store(anchor_slot_ptr + row, -1)
        tl.store(decision_ptr + row, 2)
    if AUDIT:
        scans = (coin != 0) & contested
        if not COPY:
            scans = scans & shares  # a retrieval scans exact keys: its own log-sum-exp is exact
        if scans:
            enlist(work_ptr, 2 * row + 1)


@triton.jit
def gate_kernel(
    q_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    q_pre_ptr,
    spans_ptr,  # [batch, 4]
    budget_ptr,  # [rows]
    gate_ptr,  # [num_kv_heads]
    tau_ptr,
    block_ptr,
    anchor_query_ptr,  # [rows, GROUP, HEAD_DIM]
    anchor_slot_ptr,  # [rows]
    idx_ptr,  # [rows, capacity]
    count_ptr,  # [rows]
    decision_ptr,  # [rows]
    work_ptr,  # [HEADER + 2 * rows]
    coin_ptr,  # [rows]
    num_kv_heads,
    capacity,
    num_local,
    stride_qb,
    stride_qh,
    stride_pb,
    stride_ph,
    AUDIT: tl.constexpr,
    COPY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,  # power of 2 from HEAD_DIM / 2
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
    batch, head = row // num_kv_heads, row % num_kv_heads
    offs_g, offs = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    inside = (offs_g < GROUP)[:, None] & (offs < HEAD_DIM // 2)[None, :]
    # what nearly every gate compares, asked for at once
    ptrs = q_ptr + batch * stride_qb + (head * GROUP + offs_g[:, None]) * stride_qh
    low, high = load_halves(ptrs + offs[None, :], inside, HEAD_DIM // 2)
    known = load_rule(
        row, num_kv_heads, spans_ptr, budget_ptr, gate_ptr, tau_ptr, block_ptr, anchor_query_ptr,
        anchor_slot_ptr, count_ptr, capacity, num_local, HEAD_DIM, GROUP, BLOCK_G, BLOCK_H,
    )  # fmt: skip
    coin = 0
    if AUDIT:
        coin = tl.load(coin_ptr + row)
    if PDL:
        let_next_start(work_ptr, row)
    if known[6] == 2:  # the gate compares queries before RoPE
        ptrs = q_pre_ptr + batch * stride_pb + (head * GROUP + offs_g[:, None]) * stride_ph
        low, high = load_halves(ptrs + offs[None, :], inside, HEAD_DIM // 2)
    decide(
        low, high, known, coin, row, anchor_query_ptr, anchor_slot_ptr, idx_ptr, count_ptr, decision_ptr,
        work_ptr, capacity, AUDIT, COPY, HEAD_DIM, GROUP, BLOCK_G, BLOCK_H, BLOCK,
    )  # fmt: skip

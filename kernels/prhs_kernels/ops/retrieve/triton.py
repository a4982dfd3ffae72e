"""Gate, scan and weigh: who retrieves, scores of all its candidates, importance of every middle position.

Places count the candidates of a row, sinks first, then the window; scratch memory is indexed by them.
The three stages and `select` need no reset in between: the scan hands the length of the work list on, and
the weighing clears the counter for the next step.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.sparse_decode.triton import LN_2, LOG2_E, load_query, load_rows


@triton.jit
def load_parts(spans_ptr, batch, num_local):
    """First sink, number of sinks, first window slot, middle positions, end of the window."""
    first = tl.load(spans_ptr + batch * 4)
    sinks = tl.load(spans_ptr + batch * 4 + 1) - first
    window = tl.load(spans_ptr + batch * 4 + 2)
    end = tl.load(spans_ptr + batch * 4 + 3)
    return first, sinks, window, tl.maximum(end - num_local - window, 0), end


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
    work_ptr,  # [2 + rows]
    num_kv_heads,
    capacity,
    num_local,
    stride_qb,
    stride_qh,
    stride_pb,
    stride_ph,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // num_kv_heads, row % num_kv_heads
    first, sinks, window, middle, end = load_parts(spans_ptr, batch, num_local)
    contested = tl.load(budget_ptr + row) < middle
    mode = tl.load(gate_ptr + head)
    anchor_slot = tl.load(anchor_slot_ptr + row)
    count = tl.load(count_ptr + row)

    if mode == 2:
        query = load_query(q_pre_ptr, batch, head, stride_pb, stride_ph, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D)
    else:
        query = load_query(q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D)
    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    anchor_ptrs = anchor_query_ptr + (row * GROUP + offs_g[:, None]) * HEAD_DIM + offs_d[None, :]
    inside = (offs_g[:, None] < GROUP) & (offs_d[None, :] < HEAD_DIM)
    anchor = tl.load(anchor_ptrs, mask=inside, other=0.0).to(tl.float32)
    current = query.to(tl.float32)
    norms = tl.sqrt(tl.sum(current * current, axis=1)) * tl.sqrt(tl.sum(anchor * anchor, axis=1))
    cosine = tl.sum(current * anchor, axis=1) / tl.maximum(norms, 1e-30)
    # rounding may not take it above 1: a threshold of 1 means never
    cosine = tl.minimum(tl.min(tl.where(offs_g < GROUP, cosine, 2.0), axis=0), 1.0)

    in_block = (anchor_slot >= 0) & (end - 1 - anchor_slot < tl.load(block_ptr + head))
    close = (mode != 0) & (cosine > tl.load(tau_ptr + head))
    shares = contested & in_block & close & (count < capacity)
    idx_ptr += row * capacity
    if shares:
        tl.store(idx_ptr + count, end - 1)
        tl.store(count_ptr + row, count + 1)
        tl.store(decision_ptr + row, 0)
    elif contested:
        place = tl.atomic_add(work_ptr, 1)
        tl.store(work_ptr + 2 + place, row.to(tl.int32))
        tl.store(anchor_ptrs, query, mask=inside)
        tl.store(anchor_slot_ptr + row, end - 1)
        tl.store(decision_ptr + row, 1)
    else:
        total = tl.minimum(sinks + end - window, capacity)
        for start in range(0, total, BLOCK):
            place = start + tl.arange(0, BLOCK)
            slot = tl.where(place < sinks, first + place, window - sinks + place)
            tl.store(idx_ptr + place, slot, mask=place < total)
        tl.store(count_ptr + row, total)
        tl.store(anchor_slot_ptr + row, -1)
        tl.store(decision_ptr + row, 2)


@triton.jit
def scan_kernel(
    q_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    spans_ptr,  # [batch, 4]
    work_ptr,  # [2 + rows]
    scores_ptr,  # [rows, GROUP, max_len]
    chunk_max_ptr,  # [rows, GROUP, chunks]
    chunk_sum_ptr,
    scale,
    num_kv_heads,
    max_len,
    chunks,
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
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    active = tl.load(work_ptr)
    if tl.program_id(0) == 0:
        tl.store(work_ptr + 1, active)
    offs_g = tl.arange(0, BLOCK_G)
    # chunks of all rows in turn: rows of like length finish together, and what is empty comes last
    for tile in range(tl.program_id(0), active * chunks, tl.num_programs(0)):
        row = tl.load(work_ptr + 2 + tile % active).to(tl.int64)
        chunk = tile // active
        batch, head = row // num_kv_heads, row % num_kv_heads
        first, sinks, window, middle, end = load_parts(spans_ptr, batch, 0)
        total = sinks + end - window
        begin = chunk * CHUNK
        if begin < total:
            q = load_query(q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D)
            base_ptr = k_ptr + batch * stride_kb + head * stride_kh
            stop = tl.minimum(begin + CHUNK, total)
            best = tl.full([BLOCK_G], float("-inf"), tl.float32)
            mass = tl.zeros([BLOCK_G], tl.float32)
            out_ptrs = scores_ptr + (row * GROUP + offs_g[:, None]) * max_len
            for start in range(begin, stop, BLOCK_N):
                place = start + tl.arange(0, BLOCK_N)
                valid = place < stop
                slots = tl.where(place < sinks, first + place, window - sinks + place)
                k = load_rows(base_ptr, slots, valid, stride_kn, HEAD_DIM, BLOCK_D)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
                tl.store(out_ptrs + place[None, :], scores, mask=(offs_g[:, None] < GROUP) & valid[None, :])
                scores = tl.where(valid[None, :], scores, float("-inf"))
                higher = tl.maximum(best, tl.max(scores, axis=1))  # finite: every block has a valid place
                mass = mass * tl.exp2(best - higher) + tl.sum(tl.exp2(scores - higher[:, None]), axis=1)
                best = higher
            stats = (row * GROUP + offs_g) * chunks + chunk
            tl.store(chunk_max_ptr + stats, best, mask=offs_g < GROUP)
            tl.store(chunk_sum_ptr + stats, mass, mask=offs_g < GROUP)


@triton.jit
def weigh_kernel(
    spans_ptr,  # [batch, 4]
    work_ptr,  # [2 + rows]
    scores_ptr,  # [rows, GROUP, max_len]
    chunk_max_ptr,  # [rows, GROUP, chunks]
    chunk_sum_ptr,
    weights_ptr,  # [rows, max_len], middle positions only
    lse_ptr,  # [rows, GROUP]
    num_kv_heads,
    max_len,
    chunks,
    num_local,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    active = tl.load(work_ptr + 1)
    if tl.program_id(0) == 0:
        tl.store(work_ptr, 0)
    offs_g = tl.arange(0, BLOCK_G)
    in_group = offs_g < GROUP
    for tile in range(tl.program_id(0), active * chunks, tl.num_programs(0)):
        row = tl.load(work_ptr + 2 + tile % active).to(tl.int64)
        chunk = tile // active
        first, sinks, window, middle, end = load_parts(spans_ptr, row // num_kv_heads, num_local)
        total = sinks + end - window
        if chunk * CHUNK < total:
            best = tl.full([BLOCK_G], float("-inf"), tl.float32)
            mass = tl.zeros([BLOCK_G], tl.float32)
            stats = (row * GROUP + offs_g[:, None]) * chunks
            used = tl.cdiv(total, CHUNK)
            for start in range(0, used, BLOCK_C):
                offs_c = start + tl.arange(0, BLOCK_C)
                mask = in_group[:, None] & (offs_c[None, :] < used)
                some = tl.load(chunk_max_ptr + stats + offs_c[None, :], mask=mask, other=float("-inf"))
                part = tl.load(chunk_sum_ptr + stats + offs_c[None, :], mask=mask, other=0.0)
                higher = tl.maximum(best, tl.max(some, axis=1))
                base = tl.where(in_group, higher, 0.0)  # -inf - -inf would be NaN
                mass = mass * tl.exp2(best - base) + tl.sum(part * tl.exp2(some - base[:, None]), axis=1)
                best = higher
            lse = tl.where(in_group, best + tl.log2(tl.where(in_group, mass, 1.0)), 0.0)
            if chunk == 0:
                tl.store(lse_ptr + row * GROUP + offs_g, lse * LN_2, mask=in_group)
            stop = tl.minimum(chunk * CHUNK + CHUNK, sinks + middle)
            for start in range(tl.maximum(chunk * CHUNK, sinks), stop, BLOCK_N):
                place = start + tl.arange(0, BLOCK_N)
                mask = in_group[:, None] & (place[None, :] < stop)
                scores = tl.load(
                    scores_ptr + (row * GROUP + offs_g[:, None]) * max_len + place[None, :],
                    mask=mask,
                    other=float("-inf"),
                )
                weight = tl.sum(tl.exp2(scores - lse[:, None]), axis=0)
                # never negative, so its bits order like its value
                bits = weight.to(tl.int32, bitcast=True)
                tl.store(weights_ptr + row * max_len + place - sinks, bits, mask=place < stop)

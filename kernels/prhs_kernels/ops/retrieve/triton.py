"""Scan: the scores of all candidates of the rows that retrieve or are audited.

Places count the candidates of a row, sinks first, then the window; scratch memory is indexed by them. The
work list is that of the gate.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.attention_tile.triton import LOG2_E, load_key_chunks, load_query_chunks, multiply
from prhs_kernels.ops.overlap.triton import post, wait_for_previous
from prhs_kernels.ops.retrieve.codes.triton import scaled_query, score_codes, split_query
from prhs_kernels.ops.retrieve.gate.triton import HEADER, load_parts
from prhs_kernels.ops.split_k.triton import assign


@triton.jit
def load_columns(
    q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """The group's queries as columns `[BLOCK_D, PARTS * BLOCK_G]`, `PARTS` times over; zeros where padded."""
    column = tl.arange(0, PARTS * BLOCK_G) % BLOCK_G
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        q_ptr + batch * stride_qb + (head * GROUP + column[None, :]) * stride_qh + offs_d[:, None],
        mask=(column[None, :] < GROUP) & (offs_d[:, None] < HEAD_DIM),
        other=0.0,
    )


@triton.jit
def load_query_for_keys(
    q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The group's queries as `scan_rows` takes them for exact keys."""
    if PRECISION == "ieee":
        return load_query_chunks(
            q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, PRECISION
        )
    else:
        return load_columns(q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D)


@triton.jit
def slot_of(place, first, sinks, window, end):
    """Cache slot of a place; behind the last the last one's, which may be read without a mask."""
    place = tl.minimum(place, end - 1)
    return place + tl.where(place < sinks, first, window - sinks)


@triton.jit
def load_tile(base_ptr, slots, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[len(slots), BLOCK_D]` of keys or codes, zeros behind HEAD_DIM."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + slots.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def scan_rows(
    query, base_ptr, scale_ptr, out_ptr, max_ptr, sum_ptr, scale, first, sinks, window, begin, end, keep,
    max_len, stride_kn,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, COPY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Scores, base 2, of the places [begin, end), stored if `keep`; their max and sum of exponentials.

    The running softmax is kept per thread: a reduction in the loop would wait for all warps.
    """
    offs_g = tl.arange(0, BLOCK_G)
    in_group = offs_g < GROUP
    best = tl.full([LANES, 8, BLOCK_G], -1e30, tl.float32)  # not -inf, whose difference with itself is NaN
    mass = tl.zeros([LANES, 8, BLOCK_G], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    if COPY != "exact":
        row_scale = tl.load(scale_ptr + slot_of(begin + offs_n, first, sinks, window, end))
    for start in range(begin, end, BLOCK_N):
        place = start + offs_n
        slots = slot_of(place, first, sinks, window, end)
        if COPY == "exact":
            if PRECISION == "ieee":
                k = load_key_chunks(base_ptr, slots, place < end, stride_kn, HEAD_DIM, BLOCK_D, PRECISION)
                scores = tl.trans(multiply(query, k, PRECISION)) * (scale * LOG2_E)
            else:
                k = load_tile(base_ptr, slots, stride_kn, HEAD_DIM, BLOCK_D)
                scores = tl.dot(k, query) * (scale * LOG2_E)
        else:
            # a tile ahead: nobody waits for them
            next_scale = tl.load(scale_ptr + slot_of(place + BLOCK_N, first, sinks, window, end))
            codes = load_tile(base_ptr, slots, WIDTH, WIDTH, BLOCK_W)
            scores = score_codes(codes, query, BLOCK_G, COPY, PRECISION)
            scores *= (row_scale * (scale * LOG2_E))[:, None]
            row_scale = next_scale
        valid = place < end
        # as if not contiguous: neighbours in a warp then store neighbours. Else a thread would store four of
        # them, under a mask one by one, and every store of a warp would touch four times the sectors
        at = tl.max_contiguous(place, 1)
        tl.store(
            out_ptr + offs_g[None, :] * max_len + at[:, None],
            scores,
            mask=in_group[None, :] & (valid & keep)[:, None],
        )
        scores = tl.where(valid[:, None], scores, float("-inf"))
        scores = tl.reshape(scores, (BLOCK_N // (16 * LANES), LANES, 2, 8, BLOCK_G))
        higher = tl.maximum(best, tl.max(tl.max(scores, axis=2), axis=0))
        part = tl.sum(tl.sum(tl.exp2(scores - higher[None, :, None, :, :]), axis=2), axis=0)
        mass = mass * tl.exp2(best - higher) + part
        best = higher
    best, mass = tl.reshape(best, (LANES * 8, BLOCK_G)), tl.reshape(mass, (LANES * 8, BLOCK_G))
    top = tl.max(best, axis=0)
    total = tl.sum(mass * tl.exp2(best - top[None, :]), axis=0)
    tl.store(max_ptr + offs_g * CHUNKS, top, mask=in_group)
    tl.store(sum_ptr + offs_g * CHUNKS, total, mask=in_group)


@triton.jit
def scan_piece(
    q_ptr, k_ptr, codes_ptr, key_scale_ptr, spans_ptr, scores_ptr, chunk_max_ptr, chunk_sum_ptr, scale,
    num_kv_heads, num_rows, copy_len, max_len, stride_qb, stride_qh, stride_kb, stride_kh, stride_kn,
    entry, begin, stop, size,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COPY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr,
    AUDIT: tl.constexpr,
):  # fmt: skip
    """Chunks [begin, stop) of an entry: audits read exact keys, retrievals the copy if there is one."""
    row, audited = (entry // 2).to(tl.int64), entry % 2
    batch, head = row // num_kv_heads, row % num_kv_heads
    first, sinks, window, middle, end = load_parts(spans_ptr, batch, 0)
    out_ptr = scores_ptr + row * GROUP * max_len
    stats = (audited * num_rows + row) * GROUP * CHUNKS + begin // size
    begin, stop = begin * CHUNK, tl.minimum(stop * CHUNK, sinks + end - window)
    max_ptr, sum_ptr = chunk_max_ptr + stats, chunk_sum_ptr + stats
    if AUDIT or COPY == "exact":
        reads_cache = audited == 1
        if COPY == "exact":
            reads_cache = audited >= 0
        if reads_cache:
            query = load_query_for_keys(
                q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, PRECISION
            )
            scan_rows(
                query, k_ptr + batch * stride_kb + head * stride_kh, key_scale_ptr, out_ptr, max_ptr, sum_ptr,
                scale, first, sinks, window, begin, stop, audited == 0, max_len, stride_kn,
                HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, min(BLOCK_N, 64), CHUNKS, "exact", WIDTH, BLOCK_W,
                PRECISION, LANES,
            )  # fmt: skip
    if COPY != "exact":
        if audited == 0:
            parts: tl.constexpr = 1 if COPY == "fp8" else 2
            q = load_columns(
                q_ptr, batch, head, stride_qb, stride_qh, WIDTH, GROUP, BLOCK_G, BLOCK_W, parts
            )  # fmt: skip
            query = scaled_query(q)
            if COPY == "int8":
                query = split_query(q, q, BLOCK_G)
            if COPY == "int4":
                high = load_columns(
                    q_ptr + WIDTH, batch, head, stride_qb, stride_qh, WIDTH, GROUP, BLOCK_G, BLOCK_W, parts
                )  # fmt: skip
                low, high, unit = split_query(q, high, BLOCK_G)
                query = (low, high, unit / 16.0)
            scan_rows(
                query, codes_ptr + row * copy_len * WIDTH, key_scale_ptr + row * copy_len, out_ptr, max_ptr,
                sum_ptr, scale, first, sinks, window, begin, stop, audited == 0, max_len, stride_kn,
                HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, BLOCK_N, CHUNKS, COPY, WIDTH, BLOCK_W, PRECISION, LANES,
            )  # fmt: skip


@triton.jit
def scan_kernel(
    q_ptr,  # [batch, num_qo_heads, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    codes_ptr,  # [rows, copy_len, WIDTH], uint8
    key_scale_ptr,  # [rows, copy_len]
    spans_ptr,  # [batch, 4]
    work_ptr,  # [HEADER + 2 * rows]
    scores_ptr,  # [rows, GROUP, max_len]
    chunk_max_ptr,  # [2, rows, GROUP, CHUNKS], by piece
    chunk_sum_ptr,
    scale,
    num_kv_heads,
    num_rows,
    copy_len,
    max_len,
    slots_wanted,
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
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COPY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,
    AUDIT: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    program, listed = tl.program_id(0), tl.arange(0, BLOCK_E)
    active = tl.load(work_ptr)
    # in flight at the same time, whatever lies behind the last entry
    entries = tl.load(work_ptr + HEADER + listed, mask=listed < num_rows * (2 if AUDIT else 1), other=0)
    if program == 0:
        if PDL:
            post(work_ptr + 1, active + 1)
        else:
            tl.store(work_ptr + 1, active + 1)
    if active > 0:
        entries = tl.where(listed < active, entries, 0)
        _, sinks, window, _, end = load_parts(spans_ptr, entries // 2 // num_kv_heads, 0)
        chunks = tl.where(listed < active, tl.cdiv(sinks + end - window, CHUNK), 0)
        place, begin, stop, size, wanted = assign(chunks, slots_wanted, program, active, BLOCK_E)
        if program == 0:
            tl.store(work_ptr + 2, size)
        if wanted:
            scan_piece(
                q_ptr, k_ptr, codes_ptr, key_scale_ptr, spans_ptr, scores_ptr, chunk_max_ptr, chunk_sum_ptr,
                scale, num_kv_heads, num_rows, copy_len, max_len, stride_qb, stride_qh, stride_kb, stride_kh,
                stride_kn, tl.load(work_ptr + HEADER + place), begin, stop, size, HEAD_DIM, GROUP, BLOCK_G,
                BLOCK_D, BLOCK_N, CHUNK, CHUNKS, COPY, WIDTH, BLOCK_W, PRECISION, LANES, AUDIT,
            )  # fmt: skip

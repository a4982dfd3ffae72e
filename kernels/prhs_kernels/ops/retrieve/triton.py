"""Scan: the scores of all candidates of the rows that retrieve or are audited.

Places count the candidates of a row, sinks first, then the window; scratch memory is indexed by them. The
work list is that of the gate.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.backend import interpreted
from prhs_kernels.ops.overlap.triton import wait_for_previous
from prhs_kernels.ops.retrieve.gate.triton import HEADER, load_parts
from prhs_kernels.ops.sparse_decode.triton import (
    LOG2_E,
    load_key_chunks,
    load_query,
    load_query_chunks,
    load_rows,
    multiply,
)
from prhs_kernels.ops.split_k.triton import assign, pick

PACKED = tl.constexpr(not interpreted())


@triton.jit
def round_even(x):
    """Nearest integer of |x| < 2**22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def split_query(q, q_high):
    """The group's queries in 16 bits, for products of integers: `(254 * upper + lower) * unit`.

    A code of a key copy then goes to the matrix units as it is; converted to the query's dtype it would pass
    through shared memory once more, which takes longer than reading it.
    """
    q, q_high = q.to(tl.float32), q_high.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(q), axis=1), tl.max(tl.abs(q_high), axis=1))
    step = tl.where(amax > 0.0, amax, 1.0) / 127.0
    upper, upper_high = round_even(q / step[:, None]), round_even(q_high / step[:, None])
    lower = round_even((q / step[:, None] - upper) * 254.0).to(tl.int8)
    lower_high = round_even((q_high / step[:, None] - upper_high) * 254.0).to(tl.int8)
    # what codes that are 8 too large add to a product
    sums = tl.sum(upper + upper_high, axis=1).to(tl.int32) * 254
    excess = 8 * (sums + tl.sum(lower.to(tl.int32) + lower_high.to(tl.int32), axis=1))
    return upper.to(tl.int8), lower, upper_high.to(tl.int8), lower_high, step / 254.0, excess


@triton.jit
def unpack(codes):
    """Both codes of four bits of each byte, 8 added: int8 from 1 to 15. Compiled, four bytes at a time."""
    if PACKED:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            and.b32 t, $2, 0x0F0F0F0F;
            xor.b32 $0, t, 0x08080808;
            shr.u32 t, $2, 4;
            and.b32 t, t, 0x0F0F0F0F;
            xor.b32 $1, t, 0x08080808;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return ((codes & 15) ^ 8).to(tl.int8), ((codes >> 4) ^ 8).to(tl.int8)


@triton.jit
def score_codes(
    query, base_ptr, slots, valid, COPY: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products of the group with the codes of a key copy, not yet scaled by the position's scale."""
    codes = load_rows(base_ptr, slots, valid, WIDTH, WIDTH, BLOCK_W)
    if COPY == "fp8":
        # the bits of an e4m3 number are those of an fp16 number 256 times smaller, on every architecture
        wide = codes.to(tl.int16)
        number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        scores = tl.dot(query[0], tl.trans(number.to(query[0].dtype)), input_precision=PRECISION) * 256.0
    else:
        upper, lower, upper_high, lower_high, unit, excess = query
        signed = codes.to(tl.int8, bitcast=True)
        if COPY == "int8":
            product = tl.dot(upper, tl.trans(signed)) * 254 + tl.dot(lower, tl.trans(signed))
        else:
            low, high = unpack(codes)
            low, high = tl.trans(low), tl.trans(high)
            product = tl.dot(upper, low) + tl.dot(upper_high, high)
            product = product * 254 + tl.dot(lower, low) + tl.dot(lower_high, high) - excess[:, None]
        scores = product.to(tl.float32) * unit[:, None]
    return scores


@triton.jit
def scan_rows(
    query, base_ptr, scale_ptr, out_ptr, max_ptr, sum_ptr, scale, first, sinks, window, begin, end, keep,
    max_len, stride_kn,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, COPY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores, base 2, of the places [begin, end), stored if `keep`; their max and sum of exponentials.

    The running softmax is kept per column of the tile: a reduction in the loop would wait for all warps.
    """
    offs_g = tl.arange(0, BLOCK_G)
    in_group = offs_g < GROUP
    best = tl.full([BLOCK_G, BLOCK_N], -1e30, tl.float32)  # not -inf, whose difference with itself is NaN
    mass = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        valid = place < end
        slots = tl.where(place < sinks, first + place, window - sinks + place)
        if COPY == "exact":
            k = load_key_chunks(base_ptr, slots, valid, stride_kn, HEAD_DIM, BLOCK_D, PRECISION)
            scores = multiply(query, k, PRECISION) * (scale * LOG2_E)
        else:
            scores = score_codes(query, base_ptr, slots, valid, COPY, WIDTH, BLOCK_W, PRECISION)
            row_scale = tl.load(scale_ptr + slots, mask=valid, other=0.0)
            scores *= (row_scale * (scale * LOG2_E))[None, :]
        tl.store(
            out_ptr + offs_g[:, None] * max_len + place[None, :],
            scores,
            mask=in_group[:, None] & (valid & keep)[None, :],
        )
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(best, scores)
        mass = mass * tl.exp2(best - higher) + tl.exp2(scores - higher)
        best = higher
    top = tl.max(best, axis=1)
    tl.store(max_ptr + offs_g * CHUNKS, top, mask=in_group)
    tl.store(sum_ptr + offs_g * CHUNKS, tl.sum(mass * tl.exp2(best - top[:, None]), axis=1), mask=in_group)


@triton.jit
def scan_piece(
    q_ptr, k_ptr, codes_ptr, key_scale_ptr, spans_ptr, scores_ptr, chunk_max_ptr, chunk_sum_ptr, scale,
    num_kv_heads, num_rows, copy_len, max_len, stride_qb, stride_qh, stride_kb, stride_kh, stride_kn,
    entry, begin, stop, size,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COPY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, AUDIT: tl.constexpr,
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
            q = load_query_chunks(
                q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, PRECISION
            )
            scan_rows(
                q, k_ptr + batch * stride_kb + head * stride_kh, key_scale_ptr, out_ptr, max_ptr, sum_ptr,
                scale, first, sinks, window, begin, stop, audited == 0, max_len, stride_kn,
                HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, BLOCK_N, CHUNKS, "exact", WIDTH, BLOCK_W, PRECISION,
            )  # fmt: skip
    if COPY != "exact":
        if audited == 0:
            q = load_query(q_ptr, batch, head, stride_qb, stride_qh, WIDTH, GROUP, BLOCK_G, BLOCK_W)
            high_ptr = q_ptr
            if COPY == "int4":
                high_ptr = q_ptr + WIDTH
            high = load_query(high_ptr, batch, head, stride_qb, stride_qh, WIDTH, GROUP, BLOCK_G, BLOCK_W)
            query = (q,)
            if COPY != "fp8":
                query = split_query(q, high)
            scan_rows(
                query, codes_ptr + row * copy_len * WIDTH, key_scale_ptr + row * copy_len, out_ptr, max_ptr,
                sum_ptr, scale, first, sinks, window, begin, stop, audited == 0, max_len, stride_kn,
                HEAD_DIM, GROUP, BLOCK_G, BLOCK_D, BLOCK_N, CHUNKS, COPY, WIDTH, BLOCK_W, PRECISION,
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
    AUDIT: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    active = tl.load(work_ptr)
    program = tl.program_id(0)
    if program == 0:
        tl.store(work_ptr + 1, active)
    if active > 0:
        listed = tl.arange(0, BLOCK_E)
        entries = tl.load(work_ptr + HEADER + listed, mask=listed < active, other=0)
        _, sinks, window, _, end = load_parts(spans_ptr, entries // 2 // num_kv_heads, 0)
        chunks = tl.where(listed < active, tl.cdiv(sinks + end - window, CHUNK), 0)
        place, begin, stop, size, wanted = assign(chunks, slots_wanted, program, active, BLOCK_E)
        if program == 0:
            tl.store(work_ptr + 2, size)
        if wanted:
            scan_piece(
                q_ptr, k_ptr, codes_ptr, key_scale_ptr, spans_ptr, scores_ptr, chunk_max_ptr, chunk_sum_ptr,
                scale, num_kv_heads, num_rows, copy_len, max_len, stride_qb, stride_qh, stride_kb, stride_kh,
                stride_kn, pick(listed, place, entries), begin, stop, size, HEAD_DIM, GROUP, BLOCK_G, BLOCK_D,
                BLOCK_N, CHUNK, CHUNKS, COPY, WIDTH, BLOCK_W, PRECISION, AUDIT,
            )  # fmt: skip

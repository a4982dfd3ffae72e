"""Products of a group's queries with the codes of a key copy.

Codes go to the matrix units as they come, or after a few instructions per four bytes in the registers in
which the units want them; converted to the query's dtype one by one they would take longer than reading them.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.backend import interpreted

PACKED = tl.constexpr(not interpreted())


@triton.jit
def round_even(x):
    """Nearest integer of |x| < 2**22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def part_of(q, step, first):
    """One of two parts of 8 bits of each query: `(upper + lower / 254) * step`."""
    ratio = q.to(tl.float32) / step[None, :]
    upper = round_even(ratio)
    return tl.where(first[None, :], upper, round_even((ratio - upper) * 254.0)).to(tl.int8)


@triton.jit
def split_query(q, q_high, BLOCK_G: tl.constexpr):
    """The group's queries, each in two columns, in 16 bits for products of integers: upper parts in the first
    `BLOCK_G` columns, lower ones in the others, and what a unit of each is worth.

    A code of a key copy then goes to the matrix units as it is, and one product has both parts.
    """
    amax = tl.maximum(tl.max(tl.abs(q), axis=0), tl.max(tl.abs(q_high), axis=0)).to(tl.float32)
    step = tl.where(amax > 0.0, amax, 1.0) / 127.0
    first = tl.arange(0, 2 * BLOCK_G) < BLOCK_G
    return part_of(q, step, first), part_of(q_high, step, first), tl.where(first, step, step / 254.0)


@triton.jit
def unpack(codes):
    """Both codes of four bits of each byte, times 16: int8. Compiled, four bytes at a time."""
    if PACKED:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $0, t, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return (codes << 4).to(tl.int8), (codes & 240).to(tl.int8)


@triton.jit
def halves(codes):
    """fp16 numbers of e4m3 codes divided by 256, on every architecture: they have the same bits, elsewhere.
    Compiled, four bytes at a time."""
    if PACKED:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, u;
            prmt.b32 t, $2, 0, 0x1404;
            shr.u32 u, t, 1;
            and.b32 u, u, 0x3F803F80;
            and.b32 t, t, 0x80008000;
            or.b32 $0, t, u;
            prmt.b32 t, $2, 0, 0x3424;
            shr.u32 u, t, 1;
            and.b32 u, u, 0x3F803F80;
            and.b32 t, t, 0x80008000;
            or.b32 $1, t, u;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        wide = codes.to(tl.int16)
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def scaled_query(q):
    """The group's queries in fp16, each divided by a power of two, and these times the 256 of `halves`: as
    exact as fp32 sums of products are. Queries in fp32 stay what they are."""
    amax = tl.max(tl.abs(q), axis=0).to(tl.float32)
    step = (amax.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.where(step > 0.0, step, 1.0)
    if q.dtype == tl.float32:
        query = q / step[None, :]
    else:
        query = (q.to(tl.float32) / step[None, :]).to(tl.float16)
    return query, step * 256.0


@triton.jit
def score_codes(codes, query, BLOCK_G: tl.constexpr, COPY: tl.constexpr, PRECISION: tl.constexpr):
    """Products `[BLOCK_N, BLOCK_G]` of codes of a key copy with the group, not yet scaled by the position."""
    if COPY == "fp8":
        q, unit = query
        scores = tl.dot(halves(codes).to(q.dtype), q, input_precision=PRECISION) * unit[None, :]
    else:
        low, high, unit = query
        if COPY == "int8":
            parts = tl.dot(codes.to(tl.int8, bitcast=True), low)
        else:
            low_codes, high_codes = unpack(codes)
            parts = tl.dot(high_codes, high, tl.dot(low_codes, low), out_dtype=tl.int32)
        parts = parts.to(tl.float32) * unit[None, :]
        scores = tl.sum(tl.reshape(parts, (codes.shape[0], 2, BLOCK_G)), axis=1)
    return scores

"""Rows of different length shared out to programs in pieces of equal size.

Every program reads the length of every row, one short vector, and works out alone which piece it has: first
come all pieces of full size, row by row, then what is left of each row. So the small pieces fill the gaps at
the end, and a launch of `slots + rows` programs takes about as long as an even division would.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(rows, row, values):
    """`values[row]` of a vector."""
    return tl.sum(tl.where(rows == row, values, 0), axis=0)


@triton.jit
def assign(tiles, slots, program, num_rows, BLOCK_R: tl.constexpr):
    """The piece of a program: row, first tile, tile behind the last, size of a full one, whether it has one.

    tiles: `[BLOCK_R]` int32 tiles per row, 0 behind the last row; slots: pieces of full size wanted.
    """
    rows = tl.arange(0, BLOCK_R)
    size = tl.maximum(tl.cdiv(tl.sum(tiles, axis=0), slots), 1)
    full = tiles // size
    before = tl.cumsum(full, axis=0) <= program
    # three sums at once, each below 2**21: rows that end before this piece, their pieces, those of all rows
    counted = (before.to(tl.int64) << 42) + (tl.where(before, full, 0).to(tl.int64) << 21) + full
    sums = tl.sum(counted, axis=0)
    whole = (sums & 0x1FFFFF).to(tl.int32)
    row = tl.where(program < whole, (sums >> 42).to(tl.int32), program - whole)
    length = pick(rows, row, tiles)
    piece = tl.where(program < whole, program - ((sums >> 21) & 0x1FFFFF).to(tl.int32), length // size)
    active = (program < whole) | ((row < num_rows) & (length > piece * size))
    return row, piece * size, tl.minimum(piece * size + size, length), size, active

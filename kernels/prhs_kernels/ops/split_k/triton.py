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
    ends = tl.cumsum(full, axis=0)
    whole = tl.sum(full, axis=0)
    row = tl.where(program < whole, tl.sum((ends <= program).to(tl.int32), axis=0), program - whole)
    length, mine = pick(rows, row, tiles), pick(rows, row, full)
    piece = tl.where(program < whole, program - pick(rows, row, ends) + mine, mine)
    active = (program < whole) | ((row < num_rows) & (length > mine * size))
    return row, piece * size, tl.minimum(piece * size + size, length), size, active

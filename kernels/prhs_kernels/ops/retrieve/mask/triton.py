"""Bit masks of a row's positions, 32 to a word: set from a list, widened by shifts, written out ascending.

A first mask holds the chosen positions, a second those whose neighbours are kept as well.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_bits(word):
    """Set bits of each unsigned word, int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def write_bits(word, at, first, out_ptr, begin, room):
    """Write `first` + position of every set bit of ascending words, from place `begin`; returns its end."""
    count = count_bits(word)
    end = begin + tl.cumsum(count, axis=0)
    rank, limit, base = end - count, tl.minimum(end, room), first - 127 + 32 * at
    for _ in range(tl.max(count, axis=0)):
        rest = word & (word - 1)
        lowest = (word ^ rest).to(tl.float32)  # a power of two, whose exponent is the number of the bit
        tl.store(out_ptr + rank, base + (lowest.to(tl.int32, bitcast=True) >> 23), mask=rank < limit)
        word, rank = rest, rank + 1
    return tl.max(end, axis=0)


@triton.jit
def set_bits(words_ptr, max_words, place, chosen, seeds):
    """Set the bits of chosen positions in the first mask, of those with neighbours in the second."""
    word, bit = place // 32, (place * 0 + 1) << (place % 32)
    tl.atomic_or(words_ptr + word, bit, mask=chosen, sem="relaxed")
    tl.atomic_or(words_ptr + max_words + word, bit, mask=seeds, sem="relaxed")


@triton.jit
def load_word(words_ptr, place, count):
    """Words of a bit mask, 0 beyond its ends; unsigned, for shifts that fill with zeros."""
    mask = (place >= 0) & (place < count)
    word = tl.load(words_ptr + place, mask=mask, other=0)
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def emit(chosen_ptr, seeds_ptr, out_ptr, size, window, radius, room, WORDS: tl.constexpr):
    """Write the slots of the chosen positions and of all within `radius` of a seed; returns how many."""
    kept = 0 * size
    count = tl.cdiv(size, 32)
    for start in range(0, count, WORDS):
        at = tl.max_contiguous(start + tl.arange(0, WORDS), 1)
        word = load_word(chosen_ptr, at, count)
        seed = load_word(seeds_ptr, at, count)
        before = load_word(seeds_ptr, at - 1, count)
        after = load_word(seeds_ptr, at + 1, count)
        for reach in range(1, radius + 1):
            word = word | (seed << reach) | (before >> (32 - reach))
            word = word | (seed >> reach) | (after << (32 - reach))
        inside = at < count
        behind = tl.maximum(32 * at + 32 - size, 0)  # bits of the last word that are no position
        word = tl.where(inside, word & (0xFFFFFFFF >> tl.where(inside, behind, 0).to(tl.uint32)), 0)
        kept = write_bits(word, at, window, out_ptr, kept, room)
    return kept

"""Select, dilate and compact: one program per row of the work list, exact, ties to the oldest position.

The k-th largest importance is found by bisection on its bits, for k and for the best third at once; a row of
up to 32k positions stays in registers meanwhile. No sort and no histogram: at most 31 counts, and the search
ends as soon as a count meets k, some ten counts before. The set becomes a bit mask: neighbours are shifts,
and the prefix sum runs over words.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.retrieve.triton import load_parts


@triton.jit
def tie_cutoff(keys_ptr, size, low, high, need, BLOCK: tl.constexpr):
    """Position of the `need`-th oldest key in [low, high), -1 for none."""
    cutoff = tl.full([], -1, tl.int32)
    seen = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while (start < size) & (seen < need):
        place = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + place, mask=place < size, other=-1)
        tied = ((key >= low) & (key < high)).to(tl.int32)
        order = seen + tl.cumsum(tied, axis=0)
        wanted = (tied > 0) & (order <= need)
        cutoff = tl.maximum(cutoff, tl.max(tl.where(wanted, place, -1), axis=0))
        seen += tl.sum(tied, axis=0)
        start += BLOCK
    return cutoff


@triton.jit
def is_chosen(key, place, low, high, cutoff):
    """Above the threshold, or tied with it and old enough."""
    return (key >= high) | ((key >= low) & (place <= cutoff))


@triton.jit
def count_two(keys_ptr, keys, size, one, two, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """How many keys are at least `one`, and at least `two`."""
    if RESIDENT:
        # both counts in one word and one reduction: neither is above 32768
        both = tl.sum(tl.where(keys >= one, 1, 0) + tl.where(keys >= two, 65536, 0), axis=0)
        return both & 0xFFFF, (both >> 16) & 0xFFFF
    else:
        first = tl.zeros([BLOCK], tl.int32)
        second = tl.zeros([BLOCK], tl.int32)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            key = tl.load(keys_ptr + place, mask=place < size, other=-1)
            first += (key >= one).to(tl.int32)
            second += (key >= two).to(tl.int32)
        return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def highest(keys_ptr, keys, size, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """Largest key."""
    if RESIDENT:
        return tl.max(keys, axis=0)
    else:
        best = tl.full([BLOCK], -1, tl.int32)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(keys_ptr + place, mask=place < size, other=-1))
        return tl.max(best, axis=0)


@triton.jit
def narrow(low, high, at_low, at_high, middle, at_middle, wanted):
    """Keep the half in which the count passes `wanted`: at_low >= wanted > at_high."""
    up = at_middle >= wanted
    return (
        tl.where(up, middle, low),
        tl.where(up, high, middle),
        tl.where(up, at_middle, at_low),
        tl.where(up, at_high, at_middle),
    )


@triton.jit
def pack(mask, BLOCK: tl.constexpr):
    """Bits of a mask, the first position lowest: `[BLOCK // 32]` int32."""
    bits = mask.to(tl.int32) << (tl.arange(0, BLOCK) % 32)
    return tl.sum(tl.reshape(bits, [BLOCK // 32, 32]), axis=1)


@triton.jit
def load_word(words_ptr, place, count):
    """Words of a bit mask, 0 beyond its ends; unsigned, for shifts that fill with zeros."""
    word = tl.load(words_ptr + place, mask=(place >= 0) & (place < count), other=0)
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def count_bits(word):
    """Set bits of each word, int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def emit(chosen_ptr, seeds_ptr, out_ptr, size, window, radius, room, BLOCK: tl.constexpr):
    """Write the slots of the chosen positions and of all within `radius` of a seed; returns how many."""
    kept = 0 * size
    count = tl.cdiv(size, 32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        word = load_word(chosen_ptr, place, count)
        seed = load_word(seeds_ptr, place, count)
        before = load_word(seeds_ptr, place - 1, count)
        after = load_word(seeds_ptr, place + 1, count)
        for reach in range(1, radius + 1):
            word = word | (seed << reach) | (before >> (32 - reach))
            word = word | (seed >> reach) | (after << (32 - reach))
        behind = tl.maximum(32 * place + 32 - size, 0)  # bits of the last word that are no position
        inside = place < count
        word = tl.where(inside, word & (0xFFFFFFFF >> tl.where(inside, behind, 0).to(tl.uint32)), 0)
        found = count_bits(word)
        rank = kept + tl.cumsum(found, axis=0) - found
        for bit in tl.static_range(32):
            here = ((word >> bit) & 1).to(tl.int32)
            tl.store(out_ptr + rank, window + 32 * place + bit, mask=(here > 0) & (rank < room))
            rank += here
        kept += tl.sum(found, axis=0)
    return kept


@triton.jit
def select_kernel(
    spans_ptr,  # [batch, 4]
    work_ptr,  # [2 + rows]
    weights_ptr,  # [rows, max_len]
    words_ptr,  # [rows, 2, max_words], scratch
    budget_ptr,  # [rows]
    dilation_ptr,  # [num_kv_heads]
    idx_ptr,  # [rows, capacity]
    count_ptr,  # [rows]
    num_kv_heads,
    max_len,
    max_words,
    capacity,
    num_local,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    PACK: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    if tl.program_id(0) < tl.load(work_ptr + 1):
        row = tl.load(work_ptr + 2 + tl.program_id(0)).to(tl.int64)
        first, sinks, window, size, end = load_parts(spans_ptr, row // num_kv_heads, num_local)
        k = tl.load(budget_ptr + row)
        third = k // 3
        radius = tl.load(dilation_ptr + row % num_kv_heads)
        keys_ptr = weights_ptr + row * max_len
        idx_ptr += row * capacity
        keys = tl.full([BLOCK], -1, tl.int32)
        if RESIDENT:
            offs = tl.arange(0, BLOCK)
            keys = tl.load(keys_ptr + offs, mask=offs < size, other=-1)

        high = highest(keys_ptr, keys, size, BLOCK, RESIDENT) + 1
        # nothing wanted: start where the search ends
        low = tl.where(k > 0, 0, high - 1)
        low_3, high_3 = tl.where(third > 0, 0, high - 1), high
        at_low, at_high = size, 0 * size
        at_low_3, at_high_3 = size, 0 * size
        open_k, open_3 = (high - low > 1) & (at_low > k), (high_3 - low_3 > 1) & (at_low_3 > third)
        while open_k | open_3:
            mid, mid_3 = low + (high - low) // 2, low_3 + (high_3 - low_3) // 2
            at_mid, at_mid_3 = count_two(keys_ptr, keys, size, mid, mid_3, BLOCK, RESIDENT)
            low, high, at_low, at_high = narrow(low, high, at_low, at_high, mid, at_mid, k)
            low_3, high_3, at_low_3, at_high_3 = narrow(
                low_3, high_3, at_low_3, at_high_3, mid_3, at_mid_3, third
            )
            open_k, open_3 = (high - low > 1) & (at_low > k), (high_3 - low_3 > 1) & (at_low_3 > third)
        cutoff, cutoff_3 = size, size
        if at_low > k:
            cutoff = tie_cutoff(keys_ptr, size, low, high, k - at_high, SMALL)
        if at_low_3 > third:
            cutoff_3 = tie_cutoff(keys_ptr, size, low_3, high_3, third - at_high_3, SMALL)

        for start in range(0, sinks, SMALL):
            place = start + tl.arange(0, SMALL)
            tl.store(idx_ptr + place, first + place, mask=place < tl.minimum(sinks, capacity))
        local = end - window - size
        room = capacity - sinks - local  # the most recent positions are never the ones without room
        chosen_ptr = words_ptr + row * 2 * max_words
        seeds_ptr = chosen_ptr + max_words
        for start in range(0, size, PACK):
            place = start + tl.arange(0, PACK)
            key = tl.load(keys_ptr + place, mask=place < size, other=-1)
            at = start // 32 + tl.arange(0, PACK // 32)
            chosen = pack(is_chosen(key, place, low, high, cutoff), PACK)
            tl.store(chosen_ptr + at, chosen, mask=at < max_words)
            seeds = pack(is_chosen(key, place, low_3, high_3, cutoff_3), PACK)
            tl.store(seeds_ptr + at, seeds, mask=at < max_words)
        tl.debug_barrier()  # every thread sees the words of the others
        kept = emit(chosen_ptr, seeds_ptr, idx_ptr + sinks, size, window, radius, room, SMALL // 2)
        kept = tl.maximum(tl.minimum(kept, room), 0)
        for start in range(0, local, SMALL):
            place = start + tl.arange(0, SMALL)
            slot = sinks + kept + place
            tl.store(idx_ptr + slot, window + size + place, mask=(place < local) & (slot < capacity))
        tl.store(count_ptr + row, tl.minimum(sinks + kept + local, capacity))

"""Select, dilate and compact one row: exact, ties to the oldest position, no sort.

A histogram of the importances, four bins per octave, tells in which bin the k-th largest lies, and the
smallest of the best third. All programs mark: positions above their bin are in, as bits of a mask; those of
the two bins are open and listed. The last program of a row finds the two thresholds among the open ones, by
bisection on the bits, and sets their bits. Neighbours are then shifts, and the prefix sum runs over words.
What other programs wrote is loaded past the first-level cache.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.split_k.triton import pick

BINS = tl.constexpr(256)
BIN_SHIFT = tl.constexpr(21)  # a bin has one exponent and two bits of the mantissa
FIRST_BIN = tl.constexpr(
    272
)  # the last bin ends at 32, above any sum of 16 probabilities; the first starts at 0


@triton.jit
def bin_of(bits):
    """Bin of a nonnegative number, given its bits."""
    return tl.minimum(tl.maximum((bits >> BIN_SHIFT) - FIRST_BIN, 0), BINS - 1)


@triton.jit
def pack(mask, BLOCK: tl.constexpr):
    """Bits of a mask, the first position lowest: `[BLOCK // 32]` int32."""
    bits = mask.to(tl.int32) << (tl.arange(0, BLOCK) % 32)
    return tl.sum(tl.reshape(bits, [BLOCK // 32, 32]), axis=1)


@triton.jit
def find_bin(at_least, wanted):
    """Bits where the bin of the `wanted`-th largest starts and ends, and how many are at least that large."""
    bins = tl.arange(0, BINS)
    found = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1, 0)
    low = tl.where(found > 0, (found + FIRST_BIN) << BIN_SHIFT, 0)
    return (
        low,
        (found + 1 + FIRST_BIN) << BIN_SHIFT,
        pick(bins, found, at_least),
        pick(bins, found + 1, at_least),
    )


@triton.jit
def find_bins(histogram_ptr, size, k, third):
    """`find_bin` for k and for the best third."""
    counts = tl.load(histogram_ptr + tl.arange(0, BINS))
    at_least = size - tl.cumsum(counts, axis=0) + counts
    low, high, at_low, at_high = find_bin(at_least, k)
    low_3, high_3, at_low_3, at_high_3 = find_bin(at_least, third)
    return low, high, at_low, at_high, low_3, high_3, at_low_3, at_high_3


@triton.jit
def mark(
    keys_ptr, list_ptr, found_ptr, chosen_ptr, begin, end, max_words, bounds, k, PACK: tl.constexpr
):  # fmt: skip
    """Bits of the positions [begin, end) that are surely in; the open ones onto the list, in any order."""
    low, high, at_low, _, low_3, high_3, at_low_3, _ = bounds
    # a bin that is wanted whole leaves nothing open
    high = tl.where(at_low > k, high, low)
    high_3 = tl.where(at_low_3 > k // 3, high_3, low_3)
    for start in range(begin, end, PACK):
        place = start + tl.arange(0, PACK)
        key = tl.load(keys_ptr + place, mask=place < end, other=-1)
        at = start // 32 + tl.arange(0, PACK // 32)
        tl.store(chosen_ptr + at, pack(key >= high, PACK), mask=at < max_words)
        tl.store(chosen_ptr + max_words + at, pack(key >= high_3, PACK), mask=at < max_words)
        is_open = ((key >= low) & (key < high)) | ((key >= low_3) & (key < high_3))
        rank = tl.atomic_add(found_ptr + tl.zeros([PACK], tl.int32), 1, mask=is_open, sem="relaxed")
        tl.store(list_ptr + rank, place.to(tl.float32, bitcast=True), mask=is_open)


@triton.jit
def load_listed(keys_ptr, list_ptr, order, found):
    """Positions on the list, stored as floats of the same bits, and their keys; -1 behind its end."""
    place = tl.load(list_ptr + order, mask=order < found, other=0.0, cache_modifier=".cg")
    place = place.to(tl.int32, bitcast=True)
    key = tl.load(keys_ptr + place, mask=order < found, other=-1, cache_modifier=".cg")
    return tl.where(order < found, place, -1), key


@triton.jit
def count_two(keys_ptr, list_ptr, found, keys, one, top, one_3, top_3, LIST: tl.constexpr):
    """How many keys of the list are in [one, top), and in [one_3, top_3); `keys` holds a list that fits."""
    if found <= LIST:
        first = ((keys >= one) & (keys < top)).to(tl.int32)
        second = ((keys >= one_3) & (keys < top_3)).to(tl.int32)
        # both counts in one word and one reduction: neither is above 32768
        both = tl.sum(first + (second << 16), axis=0)
        counted, counted_3 = both & 0xFFFF, (both >> 16) & 0xFFFF
    else:
        first = tl.zeros([LIST], tl.int32)
        second = tl.zeros([LIST], tl.int32)
        for start in range(0, found, LIST):
            _, key = load_listed(keys_ptr, list_ptr, start + tl.arange(0, LIST), found)
            first += ((key >= one) & (key < top)).to(tl.int32)
            second += ((key >= one_3) & (key < top_3)).to(tl.int32)
        counted, counted_3 = tl.sum(first, axis=0), tl.sum(second, axis=0)
    return counted, counted_3


@triton.jit
def narrow(low, high, at_low, at_high, middle, at_middle, wanted, still):
    """Keep the half in which the count passes `wanted`, at_low >= wanted >= at_high; if `still`."""
    up, down = still & (at_middle >= wanted), still & (at_middle < wanted)
    return (
        tl.where(up, middle, low),
        tl.where(down, middle, high),
        tl.where(up, at_middle, at_low),
        tl.where(down, at_middle, at_high),
    )


@triton.jit
def tie_cutoff(keys_ptr, list_ptr, found, low, high, need, size, LIST: tl.constexpr):
    """Position of the `need`-th oldest key in [low, high) of the list, -1 for none."""
    before, cutoff = (
        tl.full([], -1, tl.int32),
        0 * size + size - 1,
    )  # so many are at most: less than need, enough
    while cutoff - before > 1:
        middle = (before + cutoff) // 2
        tied = tl.zeros([LIST], tl.int32)
        for start in range(0, found, LIST):
            place, key = load_listed(keys_ptr, list_ptr, start + tl.arange(0, LIST), found)
            tied += ((key >= low) & (key < high) & (place <= middle)).to(tl.int32)
        enough = tl.sum(tied, axis=0) >= need
        before, cutoff = tl.where(enough, before, middle), tl.where(enough, middle, cutoff)
    return tl.where(need > 0, cutoff, -1)


@triton.jit
def thresholds(keys_ptr, list_ptr, found, size, k, third, bounds, LIST: tl.constexpr):
    """For k and for the best third: low, high and cutoff, as `is_chosen` takes them."""
    low, high, at_low, at_high, low_3, high_3, at_low_3, at_high_3 = bounds
    top, top_3, above, above_3 = high, high_3, at_high, at_high_3
    open_k, open_3 = at_low > k, at_low_3 > third
    _, keys = load_listed(keys_ptr, list_ptr, tl.arange(0, LIST), found)
    while (open_k & (high - low > 1)) | (open_3 & (high_3 - low_3 > 1)):
        mid, mid_3 = low + (high - low) // 2, low_3 + (high_3 - low_3) // 2
        at_mid, at_mid_3 = count_two(keys_ptr, list_ptr, found, keys, mid, top, mid_3, top_3, LIST)
        low, high, at_low, at_high = narrow(
            low, high, at_low, at_high, mid, above + at_mid, k, open_k & (high - low > 1)
        )
        low_3, high_3, at_low_3, at_high_3 = narrow(
            low_3,
            high_3,
            at_low_3,
            at_high_3,
            mid_3,
            above_3 + at_mid_3,
            third,
            open_3 & (high_3 - low_3 > 1),
        )
        open_k, open_3 = at_low > k, at_low_3 > third
    cutoff, cutoff_3 = size, size
    if open_k:
        cutoff = tie_cutoff(keys_ptr, list_ptr, found, low, high, k - at_high, size, LIST)
    if open_3:
        cutoff_3 = tie_cutoff(keys_ptr, list_ptr, found, low_3, high_3, third - at_high_3, size, LIST)
    return low, high, cutoff, low_3, high_3, cutoff_3


@triton.jit
def is_chosen(key, place, low, high, cutoff):
    """Above the threshold, or tied with it and old enough."""
    return (key >= high) | ((key >= low) & (place <= cutoff))


@triton.jit
def load_word(words_ptr, place, count):
    """Words of a bit mask, 0 beyond its ends; unsigned, for shifts that fill with zeros."""
    mask = (place >= 0) & (place < count)
    word = tl.load(words_ptr + place, mask=mask, other=0, cache_modifier=".cg")
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
def select_row(
    keys_ptr,  # [size], bits of the importances
    list_ptr,  # [size], the open positions
    found_ptr,  # how many
    chosen_ptr,  # [2, max_words], bits of the sure positions and of the sure ones of the best third
    idx_ptr,  # [capacity]
    count_ptr,  # one
    bounds,  # of `find_bins`
    k,
    radius,
    first,
    sinks,
    window,
    size,
    end,
    max_words,
    capacity,
    LIST: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write the sinks, the `k` best middle positions, neighbours of the best third, and the local ones."""
    found = tl.load(found_ptr, cache_modifier=".cg")
    seeds_ptr = chosen_ptr + max_words
    if found > 0:
        low, high, cutoff, low_3, high_3, cutoff_3 = thresholds(
            keys_ptr, list_ptr, found, size, k, k // 3, bounds, LIST
        )
        for start in range(0, found, LIST):
            place, key = load_listed(keys_ptr, list_ptr, start + tl.arange(0, LIST), found)
            word, bit = place // 32, tl.full([LIST], 1, tl.int32) << (place % 32)
            chosen = (place >= 0) & is_chosen(key, place, low, high, cutoff)
            tl.atomic_or(chosen_ptr + word, bit, mask=chosen, sem="relaxed")
            seeds = (place >= 0) & is_chosen(key, place, low_3, high_3, cutoff_3)
            tl.atomic_or(seeds_ptr + word, bit, mask=seeds, sem="relaxed")
    for start in range(0, sinks, LIST):
        place = start + tl.arange(0, LIST)
        tl.store(idx_ptr + place, first + place, mask=place < tl.minimum(sinks, capacity))
    local = end - window - size
    room = capacity - sinks - local  # the most recent positions are never the ones without room
    tl.debug_barrier()  # every thread sees the bits that others set
    kept = emit(chosen_ptr, seeds_ptr, idx_ptr + sinks, size, window, radius, room, WORDS)
    kept = tl.maximum(tl.minimum(kept, room), 0)
    for start in range(0, local, LIST):
        place = start + tl.arange(0, LIST)
        slot = sinks + kept + place
        tl.store(idx_ptr + slot, window + size + place, mask=(place < local) & (slot < capacity))
    tl.store(count_ptr, tl.minimum(sinks + kept + local, capacity))

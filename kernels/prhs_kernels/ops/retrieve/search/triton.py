"""Exact thresholds of a row's best positions, on a list that is known to hold them.

How many of the list lie in each of a number of equal ranges of bits tells between which two of their ends a
threshold is; bisection then counts on. Whoever fills the list counts into the bins.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(1024)  # importances are stored in blocks of so many
STEP = tl.constexpr(1 << 22)  # half an octave, in bits: the first step of a search
CEILING = tl.constexpr(0x7F800001)  # above the bits of any number
BINS_AT = tl.constexpr(32)  # bins of a row's tally, behind a line of memory with counters
OCTAVES = tl.constexpr(4)  # above the lowest of a list that all bins but the last share out


@triton.jit
def address(place):
    """Where the importance of a position lies: in every block the first bits of 32 words, then the second."""
    return (place & -UNIT) + ((place & 31) << 5) + ((place >> 5) & 31)


@triton.jit
def bin_of(keys, floor, BINS: tl.constexpr):
    """Bins of the keys of a list from `floor` on, the last one without an upper end."""
    width: tl.constexpr = (OCTAVES << 23) // BINS
    return tl.minimum((keys - floor).to(tl.uint32, bitcast=True) // width, BINS - 1).to(tl.int32)


@triton.jit
def load_listed(keys_ptr, list_ptr, order, listed):
    """Positions on the list and their keys; -1 behind its end."""
    place = tl.load(tl.max_contiguous(list_ptr + order, 1), mask=order < listed, other=0)
    return place, tl.load(keys_ptr + address(place), mask=order < listed, other=-1)


@triton.jit
def narrow(low, high, at_low, at_high, probe, at_probe, wanted, floor, step):
    """Keep the part where the count passes `wanted`, at_low >= wanted >= at_high; besides, the next probe."""
    up = (at_low > wanted) & (at_probe >= wanted)
    down = (at_low > wanted) & (at_probe < wanted)
    low, high = tl.where(up, probe, low), tl.where(down, probe, high)
    at_low, at_high = tl.where(up, at_probe, at_low), tl.where(down, at_probe, at_high)
    # the middle; while one end is still that of the search, a step from the other
    middle = low + (high - low) // 2
    probe = tl.where(low == floor, tl.maximum(high - step, middle), middle)
    return low, high, at_low, at_high, tl.where(high == CEILING, tl.minimum(low + step, middle), probe)


@triton.jit
def count_two(keys_ptr, list_ptr, listed, keys, one, other, LIST: tl.constexpr):
    """How many keys of the list are at least `one`, and `other`; `keys` holds a list that fits."""
    if listed <= LIST:
        # both counts in one word and one reduction: neither is above 32767
        both = tl.sum((keys >= one).to(tl.int32) + ((keys >= other).to(tl.int32) << 16), axis=0)
        counted, counted_other = both & 0xFFFF, both >> 16
    else:
        first = tl.zeros([LIST], tl.int32)
        second = tl.zeros([LIST], tl.int32)
        for start in range(0, listed, LIST):
            _, key = load_listed(keys_ptr, list_ptr, start + tl.arange(0, LIST), listed)
            first += (key >= one).to(tl.int32)
            second += (key >= other).to(tl.int32)
        counted, counted_other = tl.sum(first, axis=0), tl.sum(second, axis=0)
    return counted, counted_other


@triton.jit
def sum_four(one, two, three, four):
    """Sums of four vectors, in one reduction."""
    row = tl.arange(0, 4)
    tile = tl.where((row == 0)[:, None], one[None, :], tl.where((row == 1)[:, None], two[None, :], 0))
    tile = tl.where((row == 2)[:, None], three[None, :], tl.where((row == 3)[:, None], four[None, :], tile))
    sums = tl.sum(tile, axis=1)
    return (
        tl.sum(tl.where(row == 0, sums, 0), axis=0), tl.sum(tl.where(row == 1, sums, 0), axis=0),
        tl.sum(tl.where(row == 2, sums, 0), axis=0), tl.sum(tl.where(row == 3, sums, 0), axis=0),
    )  # fmt: skip


@triton.jit
def range_of(bin, at_low, at_high, wanted, floor, listed, few, BINS: tl.constexpr):
    """Ends of the bin in which the count passes `wanted`, how many reach them, and the first probe."""
    width: tl.constexpr = (OCTAVES << 23) // BINS
    low, at_low = tl.where(few, floor + bin * width, floor), tl.where(few, at_low, listed)
    open = (bin == BINS - 1) | (not few)
    high, at_high = tl.where(open, CEILING, low + width), tl.where(few, at_high, 0)
    probe = low + tl.where(open, STEP, width // 2)
    if wanted == 0:  # not even the largest key
        low, high, at_low, at_high = CEILING + 0 * low, CEILING + 0 * high, 0 * at_low, 0 * at_high
    return low, high, at_low, at_high, probe


@triton.jit
def next_guess(listed, k, floor, low, aim, aimed):
    """Bits that about `aim` keys may reach in the next retrieval, 0 for an aim not above `k`.

    listed, floor: that many reach it; low: about the threshold. If that is less than the aim, as if keys were
    spread evenly, else `aimed`.
    """
    width = (low - floor).to(tl.float32) * (aim - k) / tl.maximum(listed - k, 1)
    width = tl.minimum(tl.maximum(width, 1 << 17), 1 << 24).to(tl.int32)
    return tl.where(aim > k, tl.where(listed >= aim, aimed, tl.maximum(low - width, 0)), 0)


@triton.jit
def read_bins(counts, k, third, floor, listed, aim, LIST: tl.constexpr, BINS: tl.constexpr):
    """For the k best and the best third: ends of a range of bits, how many reach them, the first probe.

    counts: `[BINS]`, how many of the list are in each. Besides, from where on the next one may have `aim`.
    """
    reach = tl.cumsum(counts, axis=0, reverse=True)
    over = reach - counts
    within = tl.arange(0, BINS) > 0  # the first bin is reached by all
    # 15 bits are enough for counts of a list that fits; only that is then narrowed by bins
    bins, lows, highs, aimed = sum_four(
        (within & (reach >= k)).to(tl.int32) + ((within & (reach >= third)).to(tl.int32) << 16),
        tl.where(over < k, counts, 0) + (tl.where(over < third, counts, 0) << 16),
        tl.where(reach < k, counts, 0) + (tl.where(reach < third, counts, 0) << 16),
        (within & (reach >= aim)).to(tl.int32),
    )
    few = listed <= LIST
    width: tl.constexpr = (OCTAVES << 23) // BINS
    one = range_of(bins & 0xFFFF, lows & 0xFFFF, highs & 0xFFFF, k, floor, listed, few, BINS)
    other = range_of(bins >> 16, lows >> 16, highs >> 16, third, floor, listed, few, BINS)
    return one, other, next_guess(listed, k, floor, one[0], aim, floor + aimed * width)


@triton.jit
def whole_range(listed, floor):
    """A range of bits from `floor` on that `listed` keys reach, for a search without bins."""
    return floor, floor * 0 + CEILING, listed, listed * 0, floor + STEP


@triton.jit
def thresholds(keys_ptr, list_ptr, listed, keys, k, third, floor, one, other, LIST: tl.constexpr):
    """For the k best and the best third: ends of a range of bits, and how many keys are at least as large.

    one, other: the ranges in which they are, how many reach the ends, and first probes.
    """
    low, high, at_low, at_high, probe = one
    low_3, high_3, at_low_3, at_high_3, probe_3 = other
    step = tl.full([], STEP, tl.int32)
    while ((at_low > k) & (high - low > 1)) | ((at_low_3 > third) & (high_3 - low_3 > 1)):
        at, at_3 = count_two(keys_ptr, list_ptr, listed, keys, probe, probe_3, LIST)
        low, high, at_low, at_high, probe = narrow(low, high, at_low, at_high, probe, at, k, floor, step)
        low_3, high_3, at_low_3, at_high_3, probe_3 = narrow(
            low_3, high_3, at_low_3, at_high_3, probe_3, at_3, third, floor, step
        )
        step = tl.minimum(step * 2, 1 << 28)
    return low, high, at_low, at_high, low_3, high_3, at_low_3, at_high_3

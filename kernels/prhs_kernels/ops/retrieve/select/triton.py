"""Choose the new set of one row by one program: exact, ties to the oldest position, no sort.

Where those who weighed the row have not listed the best already, a sample of it tells above which importance
the k best surely lie. One pass lists those positions in ascending order; should they be fewer than k, it is
repeated with a lower bound. Both thresholds, of the k best and of the best third, are then found on the list
alone. What is chosen becomes bits of a mask: neighbours are shifts, and the prefix sum runs over words.

Importances lie as `address` says, so that a thread that packs 32 of them into a word reads along with its
neighbours.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.retrieve.mask.triton import emit, set_bits, write_bits
from prhs_kernels.ops.retrieve.search.triton import (
    BINS_AT,
    CEILING,
    STEP,
    UNIT,
    address,
    bin_of,
    load_listed,
    narrow,
    read_bins,
    thresholds,
    whole_range,
)


@triton.jit
def sample_row(keys_ptr, size, stride, SAMPLE: tl.constexpr):
    """Keys of one of every `stride` positions, -1 behind the last: `[SAMPLE]`."""
    drawn = tl.arange(0, SAMPLE)
    place = drawn * stride + ((drawn * 40503) >> 5) % stride  # a fixed step might meet a period of the text
    return tl.load(keys_ptr + address(place), mask=place < size, other=-1)


@triton.jit
def bound(keys, wanted, slack, probe):
    """Bits that `wanted` of the keys reach, and at most `slack` others but for ties; `probe`: a guess."""
    low, high, step = wanted * 0, wanted * 0 + CEILING, wanted * 0 + STEP
    at_low, at_high = wanted + slack + 1, wanted * 0
    while (at_low > wanted + slack) & (high - low > 1):
        reached = tl.sum((keys >= probe).to(tl.int32), axis=0)
        low, high, at_low, at_high, probe = narrow(
            low, high, at_low, at_high, probe, reached, wanted, 0, step
        )
        step = tl.minimum(step * 2, 1 << 28)
    return low


@triton.jit
def list_above(
    keys_ptr, list_ptr, words_ptr, low, size, max_words, WORDS: tl.constexpr, CLEAR: tl.constexpr
):  # fmt: skip
    """List positions whose key is `low` or more, ascending, and clear both masks; returns how many."""
    listed = 0 * size
    bit = tl.arange(0, 32)[:, None]
    for start in range(0, tl.cdiv(size, 32), WORDS):
        at = start + tl.arange(0, WORDS)
        block = at // 32 * UNIT
        # a thread gets one word, not a vector of them (alignment denied), and loads its bits at known offsets
        # from the first: else words would change places in every use, or each load wait for the one before
        ptrs = tl.multiple_of((keys_ptr + block + at % 32)[None, :] + 32 * bit, (4, 4))
        key = tl.load(ptrs, mask=(block < size)[None, :], other=-1)
        word = tl.sum((key >= low).to(tl.int32) << bit, axis=0)
        if CLEAR:
            chosen_ptrs = tl.max_contiguous(words_ptr + at, 1)
            tl.store(chosen_ptrs, 0, mask=at < max_words)
            tl.store(chosen_ptrs + max_words, 0, mask=at < max_words)
        listed = write_bits(word.to(tl.uint32, bitcast=True), at, 0, list_ptr, listed, size)
    return listed


@triton.jit
def mark_tied(
    keys_ptr, list_ptr, listed, words_ptr, max_words, low, high, some, low_3, high_3, some_3,
    TILE: tl.constexpr,
):  # fmt: skip
    """Set the bits of the first `some` on the list of those from `low` up to `high`: the oldest of them.

    In a loop of its own: few registers are left beside a list.
    """
    for start in range(0, listed, TILE):
        place, key = load_listed(keys_ptr, list_ptr, start + tl.arange(0, TILE), listed)
        tied, tied_3 = (key >= low) & (key < high), (key >= low_3) & (key < high_3)
        both = tied.to(tl.int32) + (tied_3.to(tl.int32) << 16)
        rank, found = tl.cumsum(both, axis=0), tl.sum(both, axis=0)
        tied, tied_3 = tied & ((rank & 0xFFFF) <= some), tied_3 & ((rank >> 16) <= some_3)
        set_bits(words_ptr, max_words, place, tied, tied_3)
        some, some_3 = some - (found & 0xFFFF), some_3 - (found >> 16)


@triton.jit
def mark(
    keys_ptr, list_ptr, listed, place, key, words_ptr, max_words, bounds, k, third, floor, size, ascending,
    LIST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Set the bits of the k best, and of the best third, of the list whose first part is given.

    ascending: that list is the one in memory; else it is made only where the oldest of equals are wanted.
    """
    low, high, at_low, at_high, low_3, high_3, at_low_3, at_high_3 = bounds
    # so many of the keys from `low` up to `high` are in: none of them where all from `high` on are enough
    high, some = tl.where(at_low == k, low, high), tl.where(at_low == k, 0, k - at_high)
    high_3, some_3 = (
        tl.where(at_low_3 == third, low_3, high_3),
        tl.where(at_low_3 == third, 0, third - at_high_3),
    )
    for start in range(0, listed, LIST):
        set_bits(words_ptr, max_words, place, key >= high, key >= high_3)
        place, key = load_listed(keys_ptr, list_ptr, start + LIST + tl.arange(0, LIST), listed)
    if (some > 0) | (some_3 > 0):
        if not ascending:
            listed = list_above(keys_ptr, list_ptr, words_ptr, floor, size, max_words, TILE, False)
            tl.debug_barrier()  # every thread sees the list
        mark_tied(
            keys_ptr, list_ptr, listed, words_ptr, max_words, low, high, some, low_3, high_3, some_3, TILE
        )


@triton.jit
def list_afresh(
    keys_ptr, list_ptr, words_ptr, mean, k, size, max_words, SAMPLE: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """List at least `k` best positions, ascending, from a value that a sample gives: how many, from where."""
    stride = tl.cdiv(size, SAMPLE)
    sample = sample_row(keys_ptr, size, stride, SAMPLE)
    expected = k.to(tl.float32) / stride
    margin = tl.where(stride > 1, 3.5 * tl.sqrt(expected) + 2.0, 0.0)  # of a binomial count
    guess = (mean * 2.0).to(tl.int32, bitcast=True)
    listed, floor = -1 + 0 * k, 1 + 0 * k
    while (listed < k) & (floor > 0):  # from 0 on there are enough, unless they are no numbers
        wanted = tl.ceil(expected + margin).to(tl.int32)
        floor = bound(sample, wanted, wanted // 8, guess)
        listed = list_above(keys_ptr, list_ptr, words_ptr, floor, size, max_words, WORDS, True)
        margin = 4.0 * margin + 4.0
        tl.debug_barrier()  # every thread sees the list
    return listed, floor


@triton.jit
def count_bins(keys_ptr, list_ptr, listed, keys, floor, bins_ptr, LIST: tl.constexpr, BINS: tl.constexpr):
    """Keys of a list per bin, `[BINS]`; the bins in memory are zero before, for all threads, and after."""
    bins_ptrs = tl.max_contiguous(bins_ptr + tl.arange(0, BINS), 1)
    for start in range(0, listed, LIST):
        order = start + tl.arange(0, LIST)
        tl.atomic_add(bins_ptr + bin_of(keys, floor, BINS), 1, mask=order < listed, sem="relaxed")
        _, keys = load_listed(keys_ptr, list_ptr, order + LIST, listed)
    tl.debug_barrier()  # every thread sees what others counted
    counts = tl.load(bins_ptrs, cache_modifier=".cg")  # the cache of this SM may hold those of before
    tl.debug_barrier()
    tl.store(bins_ptrs, 0)
    return counts


@triton.jit
def read_likely(likely_ptr, tally_ptr, room, max_list, LIST: tl.constexpr, BINS: tl.constexpr):
    """What those who weighed have listed and counted: how many, `[LIST]` positions and keys, `[BINS]` counts.

    The tally is zero again behind it, for all threads after a barrier.
    """
    order = tl.arange(0, LIST)
    # all under way at the same time, and no vectors in a thread (alignment denied): whatever follows would
    # have to change between the two
    likely_ptrs = tl.max_contiguous(likely_ptr + order, 1)
    bins_ptrs = tl.max_contiguous(tally_ptr + BINS_AT + tl.arange(0, BINS), 1)
    listed, counts = tl.load(tally_ptr + 1), tl.load(bins_ptrs)
    place = tl.load(likely_ptrs, mask=order < room, other=0)
    keys = tl.load(likely_ptrs + max_list, mask=order < room, other=-1)
    tl.debug_barrier()  # every thread knows how many there are
    tl.store(tally_ptr + 1, 0)
    tl.store(bins_ptrs, 0)
    return listed, place, tl.where(order < listed, keys, -1), counts


@triton.jit
def search_row(
    keys_ptr, list_ptr, likely_ptr, words_ptr, tally_ptr, guess_ptr, mean, floor, k, third, size, max_words,
    max_list, room, SAMPLE: tl.constexpr, LIST: tl.constexpr, WORDS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Find a list of the best, counted by bins, and the thresholds on it; note from where to list next time.

    How many are listed, the first of them and their keys, from where, whether they ascend, and the bounds.
    """
    listed, place, afresh = -1 + 0 * k, tl.arange(0, LIST), floor <= 0
    keys, counts = 0 * place, tl.zeros([BINS], tl.int32)
    if floor > 0:
        listed, place, keys, counts = read_likely(likely_ptr, tally_ptr, room, max_list, LIST, BINS)
        afresh = (listed < k) | (listed > room)
    if afresh:
        listed, floor = list_afresh(
            keys_ptr, list_ptr, words_ptr, mean, k, size, max_words, SAMPLE, WORDS
        )  # fmt: skip
        place, keys = load_listed(keys_ptr, list_ptr, tl.arange(0, LIST), listed)
        counts = count_bins(keys_ptr, list_ptr, listed, keys, floor, tally_ptr + BINS_AT, LIST, BINS)
    # next time the k best may just as well be missing as the list be full
    aim = tl.sqrt(k.to(tl.float32) * room).to(tl.int32)
    one, other, guess = read_bins(counts, k, third, floor, listed, aim, LIST, BINS)
    tl.store(guess_ptr, guess)
    bounds = thresholds(keys_ptr, list_ptr, listed, keys, k, third, floor, one, other, LIST)
    return listed, place, keys, floor, afresh, bounds


@triton.jit
def select_row(
    keys_ptr,  # [size] by `address`, bits of the importances; -1 up to the end of the block
    list_ptr,  # [size], scratch
    likely_ptr,  # [2, max_list], positions and keys from `floor` on, in any order
    words_ptr,  # [2, max_words], scratch: bits of the k best and of the best third; zeros for a `floor`
    tally_ptr,  # [BINS_AT + BINS], how many are likely at 1, per bin behind; zeros after
    guess_ptr,  # one
    idx_ptr,  # [capacity]
    count_ptr,  # one
    mean,  # importance
    floor,  # from which bits on positions were listed while they were weighed; 0 for not
    k,
    radius,
    first,
    sinks,
    window,
    size,
    end,
    max_words,
    max_list,
    room,
    capacity,
    SAMPLE: tl.constexpr,
    LIST: tl.constexpr,
    WORDS: tl.constexpr,
    EMIT: tl.constexpr,
    BINS: tl.constexpr,
):
    """Write the sinks, the `k` best middle positions, neighbours of the best third, and the local ones."""
    third = k // 3
    if BINS > 0:
        listed, place, keys, floor, ascending, bounds = search_row(
            keys_ptr, list_ptr, likely_ptr, words_ptr, tally_ptr, guess_ptr, mean, floor, k, third, size,
            max_words, max_list, room, SAMPLE, LIST, WORDS, BINS,
        )  # fmt: skip
    else:
        listed, floor = list_afresh(keys_ptr, list_ptr, words_ptr, mean, k, size, max_words, SAMPLE, WORDS)
        place, keys = load_listed(keys_ptr, list_ptr, tl.arange(0, LIST), listed)
        whole, ascending = whole_range(listed, floor), True
        bounds = thresholds(keys_ptr, list_ptr, listed, keys, k, third, floor, whole, whole, LIST)
    if LIST > 4096:  # registers of a search do not hold positions beside so many keys
        source = list_ptr
        if BINS > 0:
            source = tl.where(ascending, list_ptr, likely_ptr)
        order = tl.arange(0, LIST)
        place = tl.load(tl.max_contiguous(source + order, 1), mask=order < listed, other=0)
    mark(
        keys_ptr, list_ptr, listed, place, keys, words_ptr, max_words, bounds, k, third, floor, size,
        ascending, LIST, WORDS,
    )  # fmt: skip
    for start in range(0, sinks, 128):
        at = start + tl.arange(0, 128)
        tl.store(idx_ptr + at, first + at, mask=at < tl.minimum(sinks, capacity))
    local = end - window - size
    space = capacity - sinks - local  # the most recent positions are never the ones without it
    tl.debug_barrier()  # every thread sees the bits that others set
    kept = emit(words_ptr, words_ptr + max_words, idx_ptr + sinks, size, window, radius, space, EMIT)
    kept = tl.maximum(tl.minimum(kept, space), 0)
    for start in range(0, local, 128):
        at = start + tl.arange(0, 128)
        slot = sinks + kept + at
        tl.store(idx_ptr + slot, window + size + at, mask=(at < local) & (slot < capacity))
    tl.store(count_ptr, tl.minimum(sinks + kept + local, capacity))

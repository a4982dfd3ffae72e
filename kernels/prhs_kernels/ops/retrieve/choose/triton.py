"""Weigh and choose: importances of the positions, and from these the new set of every row on the list.

The programs share out the rows of the work list, in parts of equal length; the one that finishes the last
part of a row chooses for it, while the others go on. An audit gets its log-sum-exp and nothing else. The
counters of finished parts are zero before and after, so no memset is needed.

A long row with many parts is listed while it is weighed: whatever reaches a value that its last retrieval
found to be reached by more than the k best. Any value gives the same set; one with which the list does not
hold the k best, or does not fit, costs what was spent on it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prhs_kernels.ops.attention_tile.triton import LN_2
from prhs_kernels.ops.overlap.triton import load_relaxed
from prhs_kernels.ops.retrieve.gate.triton import HEADER, load_parts
from prhs_kernels.ops.retrieve.search.triton import BINS_AT, UNIT, bin_of
from prhs_kernels.ops.retrieve.select.triton import select_row


@triton.jit
def log_sum_exp(
    max_ptr, sum_ptr, used,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp per head of the group from what the pieces of the scan found; `[BLOCK_G]`."""
    offs_g = tl.arange(0, BLOCK_G)
    offs_c = tl.arange(0, BLOCK_C)
    mask = (offs_g[:, None] < GROUP) & (offs_c[None, :] < used)
    at = offs_g[:, None] * CHUNKS + offs_c[None, :]
    some = tl.load(max_ptr + at, mask=mask, other=float("-inf"))
    part = tl.load(sum_ptr + at, mask=mask, other=0.0)
    best = tl.max(some, axis=1)
    base = tl.where(best > float("-inf"), best, 0.0)  # -inf - -inf would be NaN
    mass = tl.sum(part * tl.exp2(some - base[:, None]), axis=1)
    lse = best + tl.log2(tl.where(mass > 0.0, mass, 1.0))
    return tl.where(offs_g < GROUP, lse, 0.0)  # a padded row must not make NaN of -inf - -inf


@triton.jit
def load_scores(
    scores_ptr, place, size, max_len, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """Scores `[BLOCK_G, BLOCK_N]` of places, -inf behind the last; `[BLOCK_N]` for a group of one.

    A tile of one row would be spread to threads the wrong way round.
    """
    if GROUP == 1:
        scores = tl.load(scores_ptr + place, mask=place < size, other=float("-inf"))
    else:
        offs_g = tl.arange(0, BLOCK_G)[:, None]
        mask = (offs_g < GROUP) & (place < size)[None, :]
        scores = tl.load(scores_ptr + offs_g * max_len + place[None, :], mask=mask, other=float("-inf"))
    return scores


@triton.jit
def count_likely(bits, limit, tally_ptr, BINS: tl.constexpr):
    """Count keys from `limit` on in the tally of their row, also by bin; gives their places on its list."""
    likely = bits >= limit
    tl.atomic_add(tally_ptr + BINS_AT + bin_of(bits, limit, BINS), 1, mask=likely, sem="relaxed")
    return tl.atomic_add(tally_ptr + 1 + 0 * bits, 1, mask=likely, sem="relaxed")


@triton.jit
def list_likely(order, place, bits, limit, lists_ptr, room, max_list):
    """Put positions whose keys reach `limit`, and the keys, where there is room on the list."""
    kept = (bits >= limit) & (order < room)
    tl.store(lists_ptr + order, place, mask=kept)
    tl.store(lists_ptr + max_list + order, bits, mask=kept)


@triton.jit
def weigh_part(
    scores, scores_ptr, weights_ptr, words_ptr, lists_ptr, tally_ptr, lse, limit, begin, end, size, max_len,
    max_words, room, max_list, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Store the importances of the middle positions [begin, end), -1 from `size` on; `scores`: the first.

    With BINS, list those whose importance has the bits `limit` or more, and clear their words of both masks.
    """
    order = tl.zeros([BLOCK_N], tl.int32)
    bits = order - 1
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        if GROUP == 1:
            weight = tl.exp2(scores - tl.sum(lse, axis=0))
        else:
            weight = tl.sum(tl.exp2(scores - lse[:, None]), axis=0)
        scores = load_scores(scores_ptr, place + BLOCK_N, tl.minimum(end, size), max_len, GROUP, BLOCK_G)
        weight = tl.where(weight <= 2 * GROUP, weight, 2 * GROUP)  # NaN, above every number, ended no search
        if BINS > 0:  # the places on the list that were asked for in the round before are known by now
            list_likely(order, place - BLOCK_N, bits, limit, lists_ptr, room, max_list)
        bits = weight.to(tl.int32, bitcast=True)  # never negative, so its bits order like its value
        bits = tl.where(place < size, bits, -1)
        if BINS > 0:
            order = count_likely(bits, limit, tally_ptr, BINS)
        words = tl.trans(tl.reshape(bits, [BLOCK_N // 32, 32]))
        at = start // 32 + tl.arange(0, BLOCK_N // 32)
        ptrs = weights_ptr + (at // 32 * UNIT + at % 32)[None, :] + 32 * tl.arange(0, 32)[:, None]
        tl.store(ptrs, words, mask=(at // 32 * UNIT < end)[None, :])
        if BINS > 0:
            inside = (at < max_words) & (32 * at < end)
            tl.store(words_ptr + at, 0, mask=inside)
            tl.store(words_ptr + max_words + at, 0, mask=inside)
    if BINS > 0:
        last = begin + (tl.cdiv(end - begin, BLOCK_N) - 1) * BLOCK_N
        list_likely(order, last + tl.arange(0, BLOCK_N), bits, limit, lists_ptr, room, max_list)


@triton.jit
def wait_for_list(work_ptr, PDL: tl.constexpr):
    """Length of the work list, from the scan's first program; waits for all of the scan if it is not empty.

    That program has started: this kernel's start only when all of the scan's have.
    """
    if PDL:
        active = load_relaxed(work_ptr + 1) - 1
        while active < 0:
            active = load_relaxed(work_ptr + 1) - 1
        gdc_launch_dependents()
        if active > 0:
            gdc_wait()
    else:
        active = tl.load(work_ptr + 1) - 1
    return active


@triton.jit
def choose_kernel(
    spans_ptr,  # [batch, 4]
    work_ptr,  # [HEADER + 2 * rows]
    scores_ptr,  # [rows, GROUP, max_len]
    list_ptr,  # the same memory as int32: scores of a row that is chosen for are no longer needed
    chunk_max_ptr,  # [2, rows, GROUP, CHUNKS], by piece
    chunk_sum_ptr,
    weights_ptr,  # [rows, max_weights], middle positions only, by `address`
    tally_ptr,  # [rows, BINS_AT + BINS], zeros: parts that are done, positions on the list, those by bin
    lists_ptr,  # [rows, 2, max_list], scratch: positions and bits of their importance
    guess_ptr,  # [rows], bits of the importance from which on positions are listed; 0 for none
    words_ptr,  # [rows, 2, max_words], scratch
    budget_ptr,  # [rows]
    dilation_ptr,  # [num_kv_heads]
    idx_ptr,  # [rows, capacity]
    count_ptr,  # [rows]
    lse_ptr,  # [rows, GROUP]
    audit_lse_ptr,  # [rows, GROUP]
    num_parts,  # into which the work is divided, more or fewer than the rows
    num_kv_heads,
    num_rows,
    max_len,
    max_weights,
    max_words,
    max_list,
    capacity,
    num_local,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SAMPLE: tl.constexpr,
    LIST: tl.constexpr,
    WORDS: tl.constexpr,
    EMIT: tl.constexpr,
    BINS: tl.constexpr,
    LISTED: tl.constexpr,
    PDL: tl.constexpr,
):
    active = wait_for_list(work_ptr, PDL)
    if tl.program_id(0) == 0:
        if PDL:
            gdc_wait()  # complete means that the scan is
        tl.store(work_ptr, 0)  # for the next step
    offs_g = tl.arange(0, BLOCK_G)
    # one part for each program: in a loop over parts, the compiler would keep every index vector of the code
    # below in registers
    parts = tl.maximum(num_parts // tl.maximum(active, 1), 1)
    if tl.program_id(0) < active * parts:
        piece = tl.load(work_ptr + 2)
        entry, part = tl.load(work_ptr + HEADER + tl.program_id(0) // parts), tl.program_id(0) % parts
        row, audited = (entry // 2).to(tl.int64), entry % 2
        first, sinks, window, size, end = load_parts(spans_ptr, row // num_kv_heads, num_local)
        units = tl.cdiv(BLOCK_N, UNIT)  # of a part at least
        span = tl.cdiv(tl.cdiv(size, units * UNIT), parts) * units * UNIT
        used = tl.where(audited == 1, 1, tl.cdiv(size, span))
        if part < used:
            begin, stop = part * span, tl.minimum(part * span + span, tl.cdiv(size, UNIT) * UNIT)
            row_ptr, keys_ptr = scores_ptr + row * GROUP * max_len + sinks, weights_ptr + row * max_weights
            # under way while the log-sum-exp is worked out
            some = load_scores(row_ptr, begin + tl.arange(0, BLOCK_N), size, max_len, GROUP, BLOCK_G)
            stats = (audited * num_rows + row) * GROUP * CHUNKS
            pieces = tl.cdiv(tl.cdiv(sinks + end - window, CHUNK), piece)
            lse = log_sum_exp(
                chunk_max_ptr + stats, chunk_sum_ptr + stats, pieces, GROUP, BLOCK_G, CHUNKS, BLOCK_C
            )
            if audited == 1:
                lse_ptr = audit_lse_ptr
            tl.store(lse_ptr + row * GROUP + offs_g, lse * LN_2, mask=(offs_g < GROUP) & (part == 0))
            if audited == 0:
                lists, tally = lists_ptr + row * 2 * max_list, tally_ptr + row * (BINS_AT + BINS)
                words, room = words_ptr + row * 2 * max_words, tl.minimum(max_list, LIST)
                floor = 0 * size
                if BINS > 0:  # what the last retrieval of the row says about this one
                    floor = tl.where(used >= LISTED, tl.load(guess_ptr + row), 0)
                    if floor > 0:
                        weigh_part(
                            some, row_ptr, keys_ptr, words, lists, tally, lse, floor, begin, stop, size,
                            max_len, max_words, room, max_list, GROUP, BLOCK_G, BLOCK_N, BINS,
                        )  # fmt: skip
                if floor <= 0:
                    weigh_part(
                        some, row_ptr, keys_ptr, words, lists, tally, lse, floor, begin, stop, size, max_len,
                        max_words, room, max_list, GROUP, BLOCK_G, BLOCK_N, 0,
                    )  # fmt: skip
                tl.debug_barrier()  # all threads have stored before one of them reports it
                if tl.atomic_add(tally, 1) == used - 1:
                    tl.store(tally, 0)
                    select_row(
                        keys_ptr, list_ptr + row * GROUP * max_len, lists, words, tally, guess_ptr + row,
                        idx_ptr + row * capacity, count_ptr + row, GROUP / size.to(tl.float32), floor,
                        tl.load(budget_ptr + row), tl.load(dilation_ptr + row % num_kv_heads), first, sinks,
                        window, size, end, max_words, max_list, room, capacity, SAMPLE, LIST, WORDS, EMIT,
                        BINS,
                    )  # fmt: skip

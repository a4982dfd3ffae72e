"""Weigh, then choose: importances and their histogram, and from these the new set of every row on the list.

Both launches share out the rows of the work list to as many programs as run at once. In the second one the
program that finishes a row last selects. An audit gets its log-sum-exp and nothing else. Histograms and
counters are zero before and after, so no memset is needed.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from prhs_kernels.ops.overlap.triton import wait_for_previous
from prhs_kernels.ops.retrieve.gate.triton import HEADER, load_parts
from prhs_kernels.ops.retrieve.select.triton import BINS, bin_of, find_bins, mark, select_row
from prhs_kernels.ops.sparse_decode.triton import LN_2


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
def weigh_part(
    scores_ptr, weights_ptr, histogram_ptr, lse, begin, end, sinks, max_len,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store importances of the middle positions [begin, end) and add them to the row's histogram."""
    offs_g = tl.arange(0, BLOCK_G)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        valid = place < end
        scores = tl.load(
            scores_ptr + offs_g[:, None] * max_len + (sinks + place)[None, :],
            mask=(offs_g[:, None] < GROUP) & valid[None, :],
            other=float("-inf"),
        )
        # never negative, so its bits order like its value
        bits = tl.sum(tl.exp2(scores - lse[:, None]), axis=0).to(tl.int32, bitcast=True)
        tl.store(weights_ptr + place, bits, mask=valid)
        counts += tl.histogram(tl.where(valid, bin_of(bits), 0), BINS)
        counts -= tl.where(bins == 0, BLOCK_N - tl.minimum(end - start, BLOCK_N), 0)
    tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def weigh_kernel(
    spans_ptr,  # [batch, 4]
    work_ptr,  # [HEADER + 2 * rows]
    scores_ptr,  # [rows, GROUP, max_len]
    chunk_max_ptr,  # [2, rows, GROUP, CHUNKS], by piece
    chunk_sum_ptr,
    weights_ptr,  # [rows, max_len], middle positions only
    histogram_ptr,  # [rows, BINS], zeros
    lse_ptr,  # [rows, GROUP]
    audit_lse_ptr,  # [rows, GROUP]
    num_kv_heads,
    num_rows,
    max_len,
    num_local,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    active = tl.load(work_ptr + 1)
    if tl.program_id(0) == 0:
        tl.store(work_ptr, 0)  # for the next step
    offs_g = tl.arange(0, BLOCK_G)
    parts = tl.maximum(tl.num_programs(0) // tl.maximum(active, 1), 1)
    for unit in range(tl.program_id(0), active * parts, tl.num_programs(0)):
        entry = tl.load(work_ptr + HEADER + unit % active)
        size = tl.load(work_ptr + 2)
        part = unit // active
        row, audited = (entry // 2).to(tl.int64), entry % 2
        first, sinks, window, middle, end = load_parts(spans_ptr, row // num_kv_heads, num_local)
        stats = (audited * num_rows + row) * GROUP * CHUNKS
        used = tl.cdiv(tl.cdiv(sinks + end - window, CHUNK), size)
        lse = log_sum_exp(chunk_max_ptr + stats, chunk_sum_ptr + stats, used, GROUP, BLOCK_G, CHUNKS, BLOCK_C)
        saved = (offs_g < GROUP) & (part == 0)
        if audited == 1:
            tl.store(audit_lse_ptr + row * GROUP + offs_g, lse * LN_2, mask=saved)
        else:
            tl.store(lse_ptr + row * GROUP + offs_g, lse * LN_2, mask=saved)
            span = tl.cdiv(tl.cdiv(middle, BLOCK_N), parts) * BLOCK_N
            weigh_part(
                scores_ptr + row * GROUP * max_len, weights_ptr + row * max_len, histogram_ptr + row * BINS,
                lse, part * span, tl.minimum(part * span + span, middle), sinks, max_len,
                GROUP, BLOCK_G, BLOCK_N,
            )  # fmt: skip


@triton.jit
def choose_kernel(
    spans_ptr,  # [batch, 4]
    work_ptr,  # [HEADER + 2 * rows]
    weights_ptr,  # [rows, max_len], middle positions only
    scores_ptr,  # [rows, GROUP, max_len], scratch for a list of positions
    histogram_ptr,  # [rows, BINS]
    counters_ptr,  # [rows, 2], zeros: parts that are done, positions on the list
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
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    LIST: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    active = tl.load(work_ptr + 1)
    parts = tl.maximum(tl.num_programs(0) // tl.maximum(active, 1), 1)
    for unit in range(tl.program_id(0), active * parts, tl.num_programs(0)):
        entry = tl.load(work_ptr + HEADER + unit % active)
        if entry % 2 == 0:
            row, part = (entry // 2).to(tl.int64), unit // active
            first, sinks, window, middle, end = load_parts(spans_ptr, row // num_kv_heads, num_local)
            k = tl.load(budget_ptr + row)
            keys_ptr, list_ptr = weights_ptr + row * max_len, scores_ptr + row * GROUP * max_len
            chosen_ptr, found_ptr = words_ptr + row * 2 * max_words, counters_ptr + 2 * row + 1
            bounds = find_bins(histogram_ptr + row * BINS, middle, k, k // 3)
            span = tl.cdiv(tl.cdiv(middle, PACK), parts) * PACK
            stop = tl.minimum(part * span + span, middle)
            mark(keys_ptr, list_ptr, found_ptr, chosen_ptr, part * span, stop, max_words, bounds, k, PACK)
            tl.debug_barrier()  # all threads have stored before one of them reports it
            if tl.atomic_add(counters_ptr + 2 * row, 1) == parts - 1:
                select_row(
                    keys_ptr, list_ptr, found_ptr, chosen_ptr, idx_ptr + row * capacity, count_ptr + row,
                    bounds, k, tl.load(dilation_ptr + row % num_kv_heads), first, sinks, window, middle, end,
                    max_words, capacity, LIST, WORDS,
                )  # fmt: skip
                tl.store(counters_ptr + 2 * row, 0)
                tl.store(found_ptr, 0)
                bins = tl.arange(0, BINS)
                tl.store(histogram_ptr + row * BINS + bins, tl.zeros([BINS], tl.int32))

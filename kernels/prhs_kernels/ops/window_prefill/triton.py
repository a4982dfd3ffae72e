"""Flash attention of a prompt's queries over sinks and a window that starts later for later queries.

A program takes a block of query rows of one head. What any of its rows may see is two spans of cache slots,
sinks and window, laid end to end; a *place* is an index into that. Only the places at which rows differ need
a mask: those up to the last row's window start, and those from the first row's own slot on. The tiles in
between are multiplied as they are, and nothing between the sinks and the window is touched.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.attention_tile.triton import multiply
from prhs_kernels.ops.window_prefill.config import capability_of, prefill_config

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # below every score, and unlike -inf it can be subtracted from itself
NO_WINDOW = 2**31 - 1


@triton.jit
def window_bounds(slot, pad, fraction, num_local, sliding_window):
    """First slot of the window and first slot visible at all, of the query at `slot` (number or tile)."""
    lowest = tl.maximum(pad, slot - sliding_window + 1)
    position = tl.maximum(slot - pad, 0)
    start = pad + (position.to(tl.float64) * fraction).to(tl.int32)
    return tl.maximum(lowest, tl.minimum(start, slot - num_local + 1)), lowest


@triton.jit
def load_tile(
    base_ptr, rows, stride, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Columns [FIRST, FIRST + WIDTH) of rows of Q, K or V; rows that are not valid are 0 and not touched."""
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride + columns
    if MASKED and HEAD_DIM < FIRST + WIDTH:
        return tl.load(ptrs, mask=valid[:, None] & (columns < HEAD_DIM), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    elif HEAD_DIM < FIRST + WIDTH:
        return tl.load(ptrs, mask=columns < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_chunks(
    base_ptr, rows, stride, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of Q or K as a tuple of its chunks of BLOCK_C columns."""
    chunks = (load_tile(base_ptr, rows, stride, valid, 0, BLOCK_C, MASKED, HEAD_DIM),)
    for first in tl.static_range(BLOCK_C, BLOCK_D, BLOCK_C):
        tile = load_tile(base_ptr, rows, stride, valid, first, BLOCK_C, MASKED, HEAD_DIM)
        chunks = chunks + (tile,)  # type: ignore[assignment]
    return chunks


@triton.jit
def attend(scores, v, best, total, acc, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax over unscaled scores; best (unscaled) and total `[BLOCK_M]`."""
    higher = tl.maximum(best, tl.max(scores, axis=1))
    shrink = tl.exp2((best - higher) * scale_log2)
    if PRECISION == "ieee":
        probs = tl.exp2((scores - higher[:, None]) * scale_log2)  # rounds in proportion to the difference
    else:
        probs = tl.exp2(scores * scale_log2 - (higher * scale_log2)[:, None])  # one instruction less
    total = total * shrink + tl.sum(probs, axis=1)
    if PRECISION == "ieee":  # summed within the tile first, for the same reason as in `multiply`
        acc = tl.fma(acc, shrink[:, None], tl.dot(probs, v, input_precision=PRECISION))
    else:
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None])
    return higher, total, acc


# numbers that change from prompt to prompt, or from layer to layer, must not each compile a kernel
@triton.jit(
    do_not_specialize=["num_qo_heads", "group", "steps", "n", "num_sinks", "num_local", "sliding_window"]
)
def window_prefill_kernel(
    q_ptr,  # [batch, num_qo_heads, steps, HEAD_DIM]
    k_ptr,  # [batch, num_kv_heads, n, HEAD_DIM]
    v_ptr,
    padding_ptr,  # [batch]
    fraction_ptr,  # one float64; a float argument would arrive as float32
    out_ptr,  # like q_ptr
    scale,
    num_qo_heads,
    group,
    steps,
    n,
    num_sinks,
    num_local,
    sliding_window,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the last queries see most: they start first, so that the short ones fill the end
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // num_qo_heads).to(tl.int64)
    head = (tl.program_id(1) % num_qo_heads).to(tl.int64)
    pad = tl.load(padding_ptr + batch).to(tl.int32)
    fraction = tl.load(fraction_ptr)
    scale_log2 = scale * LOG2_E

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = n - steps + rows
    first = n - steps + block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, n) - 1
    window, lowest = window_bounds(slot, pad, fraction, num_local, sliding_window)
    begin, begin_sinks = window_bounds(first, pad, fraction, num_local, sliding_window)
    settled, _ = window_bounds(last, pad, fraction, num_local, sliding_window)  # in every row's window
    sink_end = pad + num_sinks
    sinks = tl.maximum(tl.minimum(tl.minimum(sink_end, last + 1), begin) - begin_sinks, 0)
    places = tl.maximum(sinks + last + 1 - begin, 0)
    left = tl.cdiv(sinks + settled - begin, BLOCK_N)  # tiles
    inner = tl.maximum((sinks + first + 1 - begin) // BLOCK_N - left, 0)

    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    q = load_chunks(q_ptr, rows, stride_qm, rows < steps, True, HEAD_DIM, BLOCK_D, BLOCK_C)
    best = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(places, BLOCK_N) - inner):
        place = tl.where(i < left, i, i + inner) * BLOCK_N + tl.arange(0, BLOCK_N)
        key = tl.where(place < sinks, begin_sinks, begin - sinks) + place
        k = load_chunks(k_ptr, key, stride_kn, place < places, True, HEAD_DIM, BLOCK_D, BLOCK_C)
        v = load_tile(v_ptr, key, stride_vn, place < places, 0, BLOCK_D, True, HEAD_DIM)
        in_sinks = (key < sink_end)[None, :] & (key[None, :] >= lowest[:, None])
        seen = (in_sinks | (key[None, :] >= window[:, None])) & (key[None, :] <= slot[:, None])
        scores = tl.where(seen, multiply(q, k, PRECISION), float("-inf"))
        best, total, acc = attend(scores, v, best, total, acc, scale_log2, PRECISION)
    for i in range(left, left + inner):
        key = begin - sinks + i * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_chunks(k_ptr, key, stride_kn, key, False, HEAD_DIM, BLOCK_D, BLOCK_C)
        v = load_tile(v_ptr, key, stride_vn, key, 0, BLOCK_D, False, HEAD_DIM)
        scores = multiply(q, k, PRECISION)
        best, total, acc = attend(scores, v, best, total, acc, scale_log2, PRECISION)

    columns = tl.arange(0, BLOCK_D)[None, :]
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_ptr += batch * stride_ob + head * stride_oh
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * stride_om + columns,
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < steps)[:, None] & (columns < HEAD_DIM),
    )


def window_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    *,
    scale: float,
    window_fraction: float,
    num_sinks: int,
    num_local: int,
    sliding_window: int | None,
) -> torch.Tensor:
    """Launch; arguments as in `api.window_prefill`, already checked."""
    batch, num_qo_heads, steps, head_dim = query.shape
    n = keys.shape[2]
    config = prefill_config(head_dim, query.dtype, capability_of(query.device))
    # tokens outside heads: what the output projection reads
    output = query.new_empty(batch, steps, num_qo_heads, head_dim).transpose(1, 2)
    window_prefill_kernel[(triton.cdiv(steps, config.block_m), batch * num_qo_heads)](
        query,
        keys,
        values,
        padding.contiguous(),
        torch.full((1,), window_fraction, dtype=torch.float64, device=query.device),
        output,
        scale,
        num_qo_heads,
        num_qo_heads // keys.shape[1],
        steps,
        n,
        min(num_sinks, n),
        min(num_local, n),
        min(sliding_window or NO_WINDOW, NO_WINDOW),
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        *output.stride()[:3],
        **config.constants(query),
    )
    return output

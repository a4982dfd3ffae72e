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

from prhs_kernels.ops.window_prefill.config import capability_of, prefill_config

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # below every score, and unlike -inf it can be subtracted from itself
NO_WINDOW = 2**31 - 1


@triton.jit
def window_bounds(slot, pad, fraction, num_local, sliding_window):
    """First slot of the window and first slot visible at all, of the query at `slot` (number or tile)."""
    lowest = tl.maximum(pad, slot - sliding_window + 1)
    position = tl.maximum(slot - pad, 0)
    start = pad + (position.to(tl.float64) * fraction).to(tl.int32)
    return tl.maximum(lowest, tl.minimum(start, slot - num_local + 1)), lowest


@triton.jit
def load_tile(ptrs, offs_d, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of Q, K or V `[len(valid), BLOCK_D]`; rows that are not valid are 0 and not touched."""
    if MASKED and HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=valid[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def attend(scores, v, best, total, acc, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax, base 2, over unscaled scores; best and total `[BLOCK_M]`."""
    higher = tl.maximum(best, tl.max(scores, axis=1) * scale_log2)
    probs = tl.exp2(scores * scale_log2 - higher[:, None])
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(probs, axis=1)
    acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
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

    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    q_ptrs = q_ptr + rows.to(tl.int64)[:, None] * stride_qm + offs_d[None, :]
    q = load_tile(q_ptrs, offs_d, rows < steps, True, HEAD_DIM, BLOCK_D)
    best = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(places, BLOCK_N) - inner):
        place = tl.where(i < left, i, i + inner) * BLOCK_N + tl.arange(0, BLOCK_N)
        key = tl.where(place < sinks, begin_sinks, begin - sinks) + place
        offsets = key.to(tl.int64)[:, None]
        k = load_tile(
            k_ptr + offsets * stride_kn + offs_d[None, :], offs_d, place < places, True, HEAD_DIM, BLOCK_D
        )
        v = load_tile(
            v_ptr + offsets * stride_vn + offs_d[None, :], offs_d, place < places, True, HEAD_DIM, BLOCK_D
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        in_sinks = (key < sink_end)[None, :] & (key[None, :] >= lowest[:, None])
        seen = (in_sinks | (key[None, :] >= window[:, None])) & (key[None, :] <= slot[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        best, total, acc = attend(scores, v, best, total, acc, scale_log2, PRECISION)
    for i in range(left, left + inner):
        key = begin - sinks + i * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = key.to(tl.int64)[:, None]
        k = load_tile(
            k_ptr + offsets * stride_kn + offs_d[None, :], offs_d, key >= 0, False, HEAD_DIM, BLOCK_D
        )
        v = load_tile(
            v_ptr + offsets * stride_vn + offs_d[None, :], offs_d, key >= 0, False, HEAD_DIM, BLOCK_D
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        best, total, acc = attend(scores, v, best, total, acc, scale_log2, PRECISION)

    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_ptr += batch * stride_ob + head * stride_oh
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * stride_om + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < steps)[:, None] & (offs_d[None, :] < HEAD_DIM),
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

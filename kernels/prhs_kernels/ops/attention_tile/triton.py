"""A tile of attention: loads of queries, keys and values, their product, a step of the running softmax; and
the state `(output, lse)` of a split, with the buffers that hold it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.merge_state.triton import merge_state

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# products along head_dim that fp32 sums in one chain: PyTorch breaks sums up as well
CHAIN = tl.constexpr(64)


@triton.jit
def load_query(
    q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Columns [FIRST, FIRST + BLOCK_D) of the group's queries `[BLOCK_G, BLOCK_D]`, zeros where padded."""
    offs_g = tl.arange(0, BLOCK_G)
    offs_d = FIRST + tl.arange(0, BLOCK_D)
    return tl.load(
        q_ptr + batch * stride_qb + (head * GROUP + offs_g[:, None]) * stride_qh + offs_d[None, :],
        mask=(offs_g[:, None] < GROUP) & (offs_d[None, :] < HEAD_DIM),
        other=0.0,
    )


@triton.jit
def load_rows(
    base_ptr, slots, valid, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr = 0
):
    """Columns [FIRST, FIRST + BLOCK_D) of rows of K or V; a row that is not valid is 0 and not touched."""
    offs_d = FIRST + tl.arange(0, BLOCK_D)
    ptrs = base_ptr + slots.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if HEAD_DIM >= FIRST + BLOCK_D:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=valid[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def load_query_chunks(
    q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The group's queries as `multiply` takes them: in fp32 in tiles of CHAIN columns, otherwise in one."""
    CHUNK: tl.constexpr = min(CHAIN, BLOCK_D) if PRECISION == "ieee" else BLOCK_D
    chunks = (load_query(q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, CHUNK),)
    for first in tl.static_range(CHUNK, BLOCK_D, CHUNK):
        tile = load_query(q_ptr, batch, head, stride_qb, stride_qh, HEAD_DIM, GROUP, BLOCK_G, CHUNK, first)
        chunks = chunks + (tile,)  # type: ignore[assignment]
    return chunks


@triton.jit
def load_key_chunks(
    base_ptr, slots, valid, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows of K in the same chunks."""
    CHUNK: tl.constexpr = min(CHAIN, BLOCK_D) if PRECISION == "ieee" else BLOCK_D
    chunks = (load_rows(base_ptr, slots, valid, stride, HEAD_DIM, CHUNK),)
    for first in tl.static_range(CHUNK, BLOCK_D, CHUNK):
        tile = load_rows(base_ptr, slots, valid, stride, HEAD_DIM, CHUNK, first)
        chunks = chunks + (tile,)  # type: ignore[assignment]
    return chunks


@triton.jit
def multiply(q, k, PRECISION: tl.constexpr):
    """Q K^T of tiles in chunks. A chunk is summed apart from the others, or in fp32 rounding would add up
    along all of head_dim; `fma`, since a plain sum would be folded back into one accumulator."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(q)):
        scores = tl.fma(tl.dot(q[i], tl.trans(k[i]), input_precision=PRECISION), 1.0, scores)
    return scores


@triton.jit
def attend_tile(q, k, v, valid, best, total, acc, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax, base 2; q and k in chunks, best and total `[BLOCK_G]`, acc `[BLOCK_G,
    BLOCK_D]`. In fp32 best is not scaled, so that an exponent rounds in proportion to the difference."""
    scores = multiply(q, k, PRECISION)
    if PRECISION != "ieee":
        scores *= scale_log2
    scores = tl.where(valid[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    base = tl.where(higher > float("-inf"), higher, 0.0)  # -inf - -inf would be NaN
    if PRECISION == "ieee":
        shrink = tl.exp2((best - base) * scale_log2)
        probs = tl.exp2((scores - base[:, None]) * scale_log2)
    else:
        shrink = tl.exp2(best - base)
        probs = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(probs, axis=1)
    if PRECISION == "ieee":  # summed within the tile first, or rounding would add up along all positions
        acc = tl.fma(acc, shrink[:, None], tl.dot(probs, v, input_precision=PRECISION))
    else:
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def store_state(
    out_ptr, lse_ptr, batch, head, split, splits, num_qo_heads, best, total, acc,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise and store the state of one split; zeros and -inf if it is empty."""
    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    rows = (batch * num_qo_heads + head * GROUP + offs_g) * splits + split
    filled = total > 0.0
    out = acc / tl.where(filled, total, 1.0)[:, None]
    mask = (offs_g[:, None] < GROUP) & (offs_d[None, :] < HEAD_DIM)
    tl.store(
        out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask
    )
    lse = (best + tl.log2(tl.where(filled, total, 1.0))) * LN_2
    tl.store(lse_ptr + rows, lse, mask=offs_g < GROUP)


@triton.jit
def store_nothing(
    lse_ptr, batch, head, split, splits, num_qo_heads, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """The state of a split without a tile: only its lse is ever read."""
    offs_g = tl.arange(0, BLOCK_G)
    rows = (batch * num_qo_heads + head * GROUP + offs_g) * splits + split
    tl.store(lse_ptr + rows, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=offs_g < GROUP)


def state_buffers(query: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial states, their lse and the output; with one split the partial state is the output."""
    batch, num_qo_heads, _, head_dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch * num_qo_heads, splits, dtype=torch.float32, device=query.device)
    if splits == 1:
        return output, lse, output
    part = torch.empty(batch * num_qo_heads, splits, head_dim, dtype=torch.float32, device=query.device)
    return part, lse, output


def finish(
    part: torch.Tensor, lse: torch.Tensor, output: torch.Tensor, splits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the splits. Returns output `[batch, num_qo_heads, 1, head_dim]` and lse without head_dim."""
    if splits > 1:
        lse = merge_state(part, lse, output.view(-1, output.shape[-1]))
    return output, lse.view(output.shape[:3])

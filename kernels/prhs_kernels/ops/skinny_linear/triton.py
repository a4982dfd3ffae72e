"""Weights stream through the tensor cores as the left factor, the few rows are the right one."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.overlap.triton import pdl_options
from prhs_kernels.ops.rms_norm.api import DOWN, StartedNorm
from prhs_kernels.ops.skinny_linear.api import BLOCK_K, BLOCK_N, NUM_STAGES

NUM_WARPS = 4


@triton.jit
def accumulate(
    x_ptr, w_ptr, squares_ptr, n, begin, end, rows, width, eps, down, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows `n` of the weight times all rows of x over columns `[begin, end)`: `[BLOCK_N, BLOCK_M]` fp32.

    With sums of squares x is a norm that was started; they are asked for first and used last.
    """
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * width + k[None, :]
    x_ptrs = x_ptr + m[None, :] * width + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL:  # the next kernel may start at once: it waits for this one in its turn
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if CHUNKS > 0:
        square_ptrs = squares_ptr + m[:, None] * CHUNKS + tl.arange(0, CHUNKS)[None, :]
        squares = tl.load(square_ptrs, mask=m[:, None] < rows, other=0.0)
    for start in range(begin, end, BLOCK_K):
        # read once: what other kernels will want again may stay in the cache
        w = tl.load(w_ptrs + start, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=m[None, :] < rows, other=0.0)
        acc = tl.dot(w, x, acc)
    if CHUNKS > 0:
        acc *= (tl.rsqrt(tl.sum(squares, axis=1) / width + eps) / down)[None, :]
    return acc


@triton.jit
def linear_parts_kernel(
    x_ptr,  # [rows, width]
    w_ptr,  # [size, width]
    bias_ptr,  # [size]
    squares_ptr,  # [rows, CHUNKS], fp32; a power of 2
    out_ptr,  # [splits, rows, size], fp32
    rows,
    size,
    width,
    per_split,
    eps,
    down,
    CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(1)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * per_split
    end = tl.minimum(begin + per_split, width)
    acc = accumulate(
        x_ptr,
        w_ptr,
        squares_ptr,
        n,
        begin,
        end,
        rows,
        width,
        eps,
        down,
        CHUNKS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PDL,
    )
    if HAS_BIAS:
        if split == 0:
            acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    tl.store(out_ptr + (split * rows + m[None, :]) * size + n[:, None], acc, mask=m[None, :] < rows)


@triton.jit
def gated_linear_kernel(
    x_ptr,  # [rows, width]
    w_ptr,  # [2 * size, width]
    bias_ptr,  # [2 * size]
    squares_ptr,  # [rows, CHUNKS], fp32; a power of 2
    out_ptr,  # [rows, size]
    rows,
    size,
    width,
    eps,
    down,
    CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    # one tile: the first half of its rows are gates, the second the same columns of up
    HALF: tl.constexpr = BLOCK_N // 2
    dtype = out_ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * HALF
    n = tl.where(offs < HALF, first + offs, size + first + offs - HALF)
    acc = accumulate(
        x_ptr, w_ptr, squares_ptr, n, 0, width, rows, width, eps, down, CHUNKS, BLOCK_M, BLOCK_N, BLOCK_K, PDL
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    pair = tl.permute(tl.reshape(acc, [2, HALF, BLOCK_M]), (1, 2, 0))
    gate, up = tl.split(pair)
    # rounded where separate operations would round
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    out = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    m, column = tl.arange(0, BLOCK_M), first + tl.arange(0, HALF)
    tl.store(out_ptr + m[None, :] * size + column[:, None], out, mask=m[None, :] < rows)


def linear_parts(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, splits: int,
    norm: StartedNorm | None,
) -> torch.Tensor:  # fmt: skip
    """Launch; arguments and result as in `api.linear_parts`; norm: of the rows."""
    (count, width), size = rows.shape, weight.shape[0]
    block_m = max(16, triton.next_power_of_2(count))
    out = torch.empty(splits, count, size, dtype=torch.float32, device=rows.device)
    linear_parts_kernel[(size // BLOCK_N, splits)](
        rows,
        weight,
        bias if bias is not None else weight,
        norm.squares if norm is not None else rows,
        out,
        count,
        size,
        width,
        triton.cdiv(width // BLOCK_K, splits) * BLOCK_K,
        norm.eps if norm is not None else 0.0,
        DOWN,
        CHUNKS=0 if norm is None else norm.squares.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        **pdl_options(rows.device),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out


def gated_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stages: int,
    norm: StartedNorm | None,
) -> torch.Tensor:  # fmt: skip
    """Launch; arguments and result as in `api.gated_linear`; stages: of the loads, norm: of the rows."""
    (count, width), size = rows.shape, weight.shape[0] // 2
    block_m = max(16, triton.next_power_of_2(count))
    out = torch.empty(count, size, dtype=rows.dtype, device=rows.device)
    gated_linear_kernel[(size // (BLOCK_N // 2),)](
        rows,
        weight,
        bias if bias is not None else weight,
        norm.squares if norm is not None else rows,
        out,
        count,
        size,
        width,
        norm.eps if norm is not None else 0.0,
        DOWN,
        CHUNKS=0 if norm is None else norm.squares.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        **pdl_options(rows.device),
        num_warps=NUM_WARPS,
        num_stages=stages,
    )
    return out

"""Merging attention states on the GPU: a warp per row, whose loads do not wait for each other."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.decode_config import max_registers
from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous


@triton.jit
def merge_state_kernel(
    part_ptr,  # [rows, splits, HEAD_DIM], fp32
    part_lse_ptr,  # [rows, splits], fp32
    out_ptr,  # [rows, HEAD_DIM]
    lse_ptr,  # [rows], fp32
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    d_mask = offs_d < HEAD_DIM
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        lse = tl.load(part_lse_ptr + row * splits + offs_s, mask=offs_s < splits, other=float("-inf"))
        filled = lse > float("-inf")
        part = tl.load(
            part_ptr + (row * splits + offs_s[:, None]) * HEAD_DIM + offs_d[None, :],
            mask=(offs_s < splits)[:, None] & d_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        part = tl.where(filled[:, None], part, 0.0)  # nobody wrote the state of an empty split
        higher = tl.maximum(best, tl.max(lse, axis=0))
        base = tl.where(higher > float("-inf"), higher, 0.0)  # -inf - -inf would be NaN
        shrink = tl.exp(best - base)
        weight = tl.exp(lse - base)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
        best = higher
    merged = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, merged.to(out_ptr.dtype.element_ty), mask=d_mask)
    tl.store(lse_ptr + row, best + tl.log(total))


def merge_state(output: torch.Tensor, lse: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """Merge contiguous `[rows, splits, head_dim]` states into `merged` `[rows, head_dim]`; gives its lse."""
    rows, splits, head_dim = output.shape
    merged_lse = torch.empty(rows, dtype=torch.float32, device=output.device)
    merge_state_kernel[(rows,)](
        output,
        lse,
        merged,
        merged_lse,
        splits,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_S=min(16, triton.next_power_of_2(splits)),
        num_warps=1,
        maxnreg=max_registers(1),
        **pdl_options(output.device),
    )
    return merged_lse

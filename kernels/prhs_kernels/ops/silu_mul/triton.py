"""Pointwise over the two halves of a fused projection."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous

BLOCK = 1024


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # [rows, 2 * size]
    out_ptr,  # [rows, size]
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_up_ptr + row * 2 * size + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + offs, mask=mask, other=0.0).to(tl.float32)
    # rounded in between, as two operations would
    activated = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + offs, activated * up, mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Launch; `gate_up` `[rows, 2 * size]` contiguous."""
    rows, width = gate_up.shape
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width // 2, BLOCK))
    silu_mul_kernel[grid](gate_up, out, width // 2, BLOCK=BLOCK, num_warps=4, **pdl_options(out.device))
    return out

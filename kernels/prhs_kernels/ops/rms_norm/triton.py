"""One program per row of the residual stream, which stays in registers, or per chunk of a row."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prhs_kernels.ops.decode_config import max_registers
from prhs_kernels.ops.overlap.triton import pdl_options, wait_for_previous


@triton.jit
def added(
    hidden_ptr, residual_ptr, at, mask, part, dtype: tl.constexpr, SPLITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Partial sums, `part` apart, and residual stream at `at`; rounded as separate operations would be."""
    x = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(hidden_ptr + split * part + at, mask=mask, other=0.0)
    x = x.to(dtype).to(tl.float32)  # what a projection rounds to
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)  # and a sum of its own
    return x


@triton.jit
def rms_norm_kernel(
    hidden_ptr,  # [SPLITS, rows, size]
    residual_ptr,
    weight_ptr,  # [size]
    out_ptr,  # [rows, size]
    total_ptr,
    rows,
    size,
    eps,
    SPLITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE_TOTAL: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * size
    offs = tl.arange(0, BLOCK)
    mask = offs < size
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    wait_for_previous(PDL)
    dtype = out_ptr.dtype.element_ty
    x = added(hidden_ptr, residual_ptr, row + offs, mask, rows * size, dtype, SPLITS, HAS_RESIDUAL)
    if STORE_TOTAL:
        tl.store(total_ptr + row + offs, x, mask=mask)
    scaled = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    # two roundings, as transformers has them: of the scaled row, and of its product with the weight
    scaled = scaled.to(dtype).to(tl.float32)
    tl.store(out_ptr + row + offs, scaled * weight.to(tl.float32), mask=mask)


@triton.jit
def start_norm_kernel(
    hidden_ptr,  # [SPLITS, rows, size]
    residual_ptr,
    weight_ptr,  # [size]
    out_ptr,  # [rows, size]
    squares_ptr,  # [rows, chunks], fp32
    total_ptr,  # [rows, size]
    rows,
    size,
    down,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    at = row * size + offs
    x = added(hidden_ptr, residual_ptr, at, mask, rows * size, out_ptr.dtype.element_ty, SPLITS, True)
    tl.store(out_ptr + at, x * weight * down, mask=mask)
    tl.store(total_ptr + at, x, mask=mask)
    tl.store(squares_ptr + row * tl.num_programs(1) + chunk, tl.sum(x * x, axis=0))


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; arguments and results as in `api.rms_norm`, `hidden` contiguous."""
    rows, size = hidden.shape[-2:]
    out = torch.empty(rows, size, dtype=weight.dtype, device=hidden.device)
    as_it_is = residual is None and hidden.dim() == 2
    total = hidden if as_it_is else torch.empty_like(out)
    block = triton.next_power_of_2(size)
    num_warps = min(16, max(1, block // 256))
    rms_norm_kernel[(rows,)](
        hidden,
        hidden if residual is None else residual.contiguous(),
        weight,
        out,
        total,
        rows,
        size,
        eps,
        SPLITS=1 if hidden.dim() == 2 else hidden.shape[0],
        HAS_RESIDUAL=residual is not None,
        STORE_TOTAL=not as_it_is,
        BLOCK=block,
        **pdl_options(hidden.device),
        num_warps=num_warps,
        maxnreg=max_registers(num_warps),
    )
    return out, total


def start_norm(
    hidden: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, chunk: int, down: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; arguments and results as in `reference.start_norm`, all contiguous."""
    rows, size = residual.shape
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    grid = (rows, triton.next_power_of_2(triton.cdiv(size, chunk)))  # empty chunks add nothing
    squares = torch.empty(grid, dtype=torch.float32, device=hidden.device)
    start_norm_kernel[grid](
        hidden,
        residual,
        weight,
        out,
        squares,
        total,
        rows,
        size,
        down,
        SPLITS=1 if hidden.dim() == 2 else hidden.shape[0],
        BLOCK=chunk,
        **pdl_options(hidden.device),
        num_warps=4,
    )
    return out, squares, total

"""Multiply few rows with a large weight: partial sums for the next kernel to add, or the gated activation."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend, check_like, check_shape, num_sms, use_triton
from prhs_kernels.ops.skinny_linear import reference

MAX_ROWS = 32  # beyond, the library's matrix product is at the bandwidth of the weights
BLOCK_N, BLOCK_K = 64, 128
PROGRAMS_PER_SM = 2  # what shared memory lets run together
DTYPES = (torch.float16, torch.bfloat16)


def fits(rows: int, weight: torch.Tensor) -> bool:
    """Whether the kernels take this: few rows, 16 bit, sizes in whole blocks."""
    size, width = weight.shape
    return 0 < rows <= MAX_ROWS and weight.dtype in DTYPES and not size % BLOCK_N and not width % BLOCK_K


def num_splits(weight: torch.Tensor) -> int:
    """Programs that share an output tile: enough of them to fill the device, from shapes only."""
    tiles, blocks = weight.shape[0] // BLOCK_N, weight.shape[1] // BLOCK_K
    wanted = max(1, PROGRAMS_PER_SM * num_sms(weight.device) // max(1, tiles))
    return -(-blocks // -(-blocks // min(wanted, blocks)))  # no split that is left without a block


def linear_parts(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    splits: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`rows @ weight.T + bias` as partial sums, to be added (and rounded) by the kernel that reads them.

    Args:
        rows: `[rows, width]`; weight: `[size, width]`, 16 bit; bias: `[size]` or None.
        splits: parts of the width; default from the shapes and the device.

    Returns:
        `[splits, rows, size]` fp32.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together, or that `fits` denies.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    _check(rows, weight, bias)
    splits = num_splits(weight) if splits is None else splits
    if not use_triton(backend, rows):
        return reference.linear_parts(rows, weight, bias, splits, BLOCK_K)
    from prhs_kernels.ops.skinny_linear import triton as kernel

    return kernel.linear_parts(rows.contiguous(), weight, bias, splits)


def gated_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: Backend = "auto"
) -> torch.Tensor:
    """`silu(gate) * up` of one fused projection.

    Args:
        rows: `[rows, width]`; weight: `[2 * size, width]`, 16 bit, the gate first; bias: `[2 * size]`.

    Returns:
        `[rows, size]`.

    Raises:
        UsageError, ResourceError: as `linear_parts`.
    """
    _check(rows, weight, bias)
    if not use_triton(backend, rows):
        return reference.gated_linear(rows, weight, bias)
    from prhs_kernels.ops.skinny_linear import triton as kernel

    return kernel.gated_linear(rows.contiguous(), weight, bias)


def _check(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_shape("rows", rows, (None, weight.shape[1]))
    check_like("weight", weight, rows)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_like("bias", bias, rows)
    if not weight.is_contiguous():
        raise UsageError("weight: expected a contiguous tensor")
    if not fits(rows.shape[0], weight):
        raise UsageError(
            f"{rows.shape[0]} rows, weight {list(weight.shape)} in {weight.dtype}: the kernels take up to "
            f"{MAX_ROWS} rows of 16 bit, sizes in blocks of {BLOCK_N} x {BLOCK_K}"
        )

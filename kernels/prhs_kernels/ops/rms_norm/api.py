"""Add to the residual stream and normalise it."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.rms_norm import reference

CHUNK = 512  # columns of a program of `start_norm`
DOWN = 1 / 16  # so that a product of row and weight stays in the range of fp16


@dataclasses.dataclass(frozen=True, eq=False)
class StartedNorm:
    """Normalised rows but for a factor per row, which a projection can apply behind its sums.

    rows: `[rows, size]`, `DOWN * weight * x`. squares: `[rows, chunks]` fp32, sums of x^2.
    """

    rows: torch.Tensor
    squares: torch.Tensor
    eps: float

    def factors(self) -> torch.Tensor:
        """`[rows]`, in the dtype of the sums."""
        mean = self.squares.sum(dim=-1) / self.rows.shape[-1]
        return torch.rsqrt(mean + self.eps) / DOWN


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight * x / sqrt(mean(x^2) + eps)` of `x = hidden + residual`, rounded where transformers rounds.

    Args:
        hidden: `[rows, size]`, or `[splits, rows, size]` fp32 partial sums of `linear_parts`. residual:
            `[rows, size]`, or None for nothing to add. weight: `[size]`, in the dtype of the result.

    Returns:
        the normalised rows and `x`, the new residual stream, `[rows, size]` both.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    _check(hidden, weight, residual)
    if not use_triton(backend, hidden):
        return reference.rms_norm(hidden, weight, eps, residual)
    from prhs_kernels.ops.rms_norm import triton as kernel

    return kernel.rms_norm(hidden.contiguous(), weight, eps, residual)


def start_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor,
    backend: Backend = "auto",
) -> tuple[StartedNorm, torch.Tensor]:
    """`rms_norm` whose last factor is left to `linear_parts` or `gated_linear`.

    No program then needs a whole row: many share one, each adds up a chunk of it. Rounded once where
    `rms_norm` rounds twice.

    Args:
        as in `rms_norm`.

    Returns:
        what to hand on, and the new residual stream `[rows, size]`.

    Raises:
        UsageError, ResourceError: as `rms_norm`.
    """
    _check(hidden, weight, residual)
    if not use_triton(backend, hidden):
        rows, squares, total = reference.start_norm(hidden, weight, residual, CHUNK, DOWN)
    else:
        from prhs_kernels.ops.rms_norm import triton as kernel

        rows, squares, total = kernel.start_norm(
            hidden.contiguous(), weight, residual.contiguous(), CHUNK, DOWN
        )
    return StartedNorm(rows, squares, eps), total


def _check(hidden: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    parts = hidden.dim() == 3
    check_shape("hidden", hidden, (None, None, None) if parts else (None, None))
    check_like("hidden", hidden, weight, (torch.float32,) if parts else ())
    check_shape("weight", weight, (hidden.shape[-1],))
    if residual is not None:
        check_shape("residual", residual, tuple(hidden.shape[-2:]))
        check_like("residual", residual, weight)

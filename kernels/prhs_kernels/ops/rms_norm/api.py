"""Add to the residual stream and normalise it."""

from __future__ import annotations

import torch

from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.rms_norm import reference


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
    parts = hidden.dim() == 3
    check_shape("hidden", hidden, (None, None, None) if parts else (None, None))
    check_like("hidden", hidden, weight, (torch.float32,) if parts else ())
    check_shape("weight", weight, (hidden.shape[-1],))
    if residual is not None:
        check_shape("residual", residual, tuple(hidden.shape[-2:]))
        check_like("residual", residual, weight)
    if not use_triton(backend, hidden):
        return reference.rms_norm(hidden, weight, eps, residual)
    from prhs_kernels.ops.rms_norm import triton as kernel

    return kernel.rms_norm(hidden.contiguous(), weight, eps, residual)

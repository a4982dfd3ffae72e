"""Merge attention states of disjoint key sets."""

from __future__ import annotations

import torch

from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.merge_state import reference


def merge_state(
    output: torch.Tensor, lse: torch.Tensor, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key sets from the attention over each of them.

    Args:
        output: `[..., splits, head_dim]`, each split normalised by itself; not read where lse is -inf.
        lse: `[..., splits]` fp32 (fp64 for the reference), natural log-sum-exp; -inf for an empty split.

    Returns:
        output `[..., head_dim]` and lse `[...]` in fp32 (fp64); 0 and -inf where every split is empty.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_shape("lse", lse, tuple(output.shape[:-1]))
    check_like("lse", lse, output, (torch.float32, torch.float64))
    if not use_triton(backend, output):
        return reference.merge_state(output, lse)
    check_like("lse", lse, output, (torch.float32,))
    from prhs_kernels.ops.merge_state import triton as kernel

    splits, head_dim = output.shape[-2:]
    merged = torch.empty(*output.shape[:-2], head_dim, dtype=torch.float32, device=output.device)
    merged_lse = kernel.merge_state(
        output.reshape(-1, splits, head_dim).contiguous(),
        lse.reshape(-1, splits).contiguous(),
        merged.view(-1, head_dim),
    )
    return merged, merged_lse.view(output.shape[:-2])

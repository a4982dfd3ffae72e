"""`silu(gate) * up` of one fused projection."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend, check_shape, use_triton
from prhs_kernels.ops.silu_mul import reference


def silu_mul(gate_up: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: `[rows, 2 * size]`, the gate first.

    Returns:
        `[rows, size]`.

    Raises:
        UsageError: not two halves.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_shape("gate_up", gate_up, (None, None))
    if gate_up.shape[1] % 2:
        raise UsageError(f"gate_up: expected an even number of columns, got {gate_up.shape[1]}")
    if not use_triton(backend, gate_up):
        return reference.silu_mul(gate_up)
    from prhs_kernels.ops.silu_mul import triton as kernel

    return kernel.silu_mul(gate_up.contiguous())

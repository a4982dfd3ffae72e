"""Attention of one decode step over everything it may see."""

from __future__ import annotations

import torch

from prhs_kernels.ops.backend import (
    Backend,
    check_attention,
    check_kernel_limits,
    check_like,
    check_shape,
    use_triton,
)
from prhs_kernels.ops.decode_config import dense_config
from prhs_kernels.ops.dense_decode import reference


def dense_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    spans: torch.Tensor | None = None,
    num_splits: int | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all slots, or over the sinks and the window of each sequence.

    Args:
        query: `[batch, num_qo_heads, 1, head_dim]`, float32, float16 or bfloat16.
        keys, values: `[batch, num_kv_heads, n, head_dim]`, the query's dtype.
        scale: factor on the dot products, positive.
        spans: `[batch, 4]` int32 of `candidate_spans`: left padding, slots in use and the model's own
            window, each of them per sequence. None for all n slots.
        num_splits: programs per KV head; default from the shapes and the device.
        backend: `auto` is triton on CUDA, the reference elsewhere.

    Returns:
        output like the query, and the natural log-sum-exp `[batch, num_qo_heads, 1]` in fp32 (fp64 for a
        float64 query in the reference); 0 and -inf for a sequence that sees nothing.

    Raises:
        UsageError: shapes, dtypes, devices, head_dim or group that the backend cannot take.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_attention(query, keys, values, scale)
    if spans is not None:
        check_shape("spans", spans, (query.shape[0], 4))
        check_like("spans", spans, query, (torch.int32,))
    if not use_triton(backend, query):
        return reference.dense_decode(query, keys, values, spans, scale)
    check_kernel_limits(query, keys, values)
    from prhs_kernels.ops.dense_decode import triton as kernel

    config = dense_config(query, keys.shape[1], keys.shape[2], num_splits)
    return kernel.dense_decode(
        query if query.stride(-1) == 1 else query.contiguous(),
        keys,
        values,
        None if spans is None else spans.contiguous(),
        scale,
        config,
    )

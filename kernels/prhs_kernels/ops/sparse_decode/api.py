"""Attention of one decode step over kept positions."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import (
    Backend,
    check_attention,
    check_kernel_limits,
    check_like,
    check_shape,
    use_triton,
)
from prhs_kernels.ops.decode_config import sparse_config
from prhs_kernels.ops.sparse_decode import reference


def sparse_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float,
    count: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    num_splits: int | None = None,
    mean_kept: int | None = None,
    decision: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the rows of K and V that each KV head kept; a KV head without rows gives 0 and lse -inf.

    Args:
        query: `[batch, num_qo_heads, 1, head_dim]`, float32, float16 or bfloat16.
        keys, values: `[batch, num_kv_heads, n, head_dim]`, the query's dtype; read at `indices` only.
        indices: `[batch, num_kv_heads, max_kept]` int32 or int64 slots below n; a negative one is no row.
        scale: factor on the dot products, positive.
        count: `[batch, num_kv_heads]` int32 or int64, on the device; indices from there on are not read.
        spans: `[batch, 4]` int32 of `candidate_spans`; indices outside are skipped, so that a set stays
            valid while the window moves.
        num_splits: programs per KV head; default from the shapes and the device, and from
        mean_kept: positions that a KV head is expected to keep on average, by default `max_kept`.
        decision: `[batch, num_kv_heads]` int32, `state.decision` of the `retrieve` whose launches stand
            directly before this one in the stream, with the indices and the count of that state. Heads that
            did not retrieve are then attended to while it still chooses for the others; whatever it was
            given, its scratch too, must be held until here, since memory that is freed in between may be
            handed out for the results. None: waits for everything before. The reference has no use for it.
        backend: `auto` is triton on CUDA, the reference elsewhere.

    Returns:
        output like the query, and the natural log-sum-exp `[batch, num_qo_heads, 1]` in fp32 (fp64 for a
        float64 query in the reference).

    Raises:
        UsageError: shapes, dtypes, devices, head_dim or group that the backend cannot take.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_attention(query, keys, values, scale)
    batch, num_kv_heads = keys.shape[:2]
    check_shape("indices", indices, (batch, num_kv_heads, None))
    check_like("indices", indices, query, (torch.int32, torch.int64))
    if count is not None:
        check_shape("count", count, (batch, num_kv_heads))
        check_like("count", count, query, (torch.int32, torch.int64))
    if spans is not None:
        check_shape("spans", spans, (batch, 4))
        check_like("spans", spans, query, (torch.int32,))
    if decision is not None:
        if count is None:
            raise UsageError("decision: comes with the count of the same state")
        check_shape("decision", decision, (batch, num_kv_heads))
        check_like("decision", decision, query, (torch.int32,))
    if not use_triton(backend, query):
        return reference.sparse_decode(query, keys, values, _tidy(indices, count, spans), scale)
    check_kernel_limits(query, keys, values)
    from prhs_kernels.ops.sparse_decode import triton as kernel

    config = sparse_config(query, num_kv_heads, indices.shape[-1], num_splits, mean_kept)
    return kernel.sparse_decode(
        query if query.stride(-1) == 1 else query.contiguous(),
        keys,
        values,
        indices.contiguous(),
        None if count is None else count.contiguous(),
        None if spans is None else spans.contiguous(),
        scale,
        config,
        None if decision is None else decision.contiguous(),
    )


def _tidy(indices: torch.Tensor, count: torch.Tensor | None, spans: torch.Tensor | None) -> torch.Tensor:
    """Indices `[batch, num_kv_heads, max_kept]` int64 for the reference: -1 for every row to skip."""
    indices = indices.long()
    if count is not None:
        behind = torch.arange(indices.shape[-1], device=indices.device) >= count.unsqueeze(-1)
        indices = indices.masked_fill(behind, -1)
    if spans is not None:
        first, sink_end, window = (spans[:, i, None, None] for i in range(3))
        inside = (indices >= window) | ((indices >= first) & (indices < sink_end))
        indices = indices.masked_fill(~inside, -1)
    return indices

"""Split a fused projection into heads, rotate queries and key, and append key and value to the cache."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.rope_append import reference


def rope_append(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of one decode step after and before RoPE, and the new key; `keys` and `values` get its row.

    Args:
        qkv: `[batch, (num_qo_heads + 2 * num_kv_heads) * head_dim]`, query heads first, then key, then
            value; or `[splits, batch, ...]` fp32 partial sums of `linear_parts`.
        keys, values: `[batch, num_kv_heads, n, head_dim]`, written at `slots` only.
        cos, sin: `[max_positions, head_dim / 2]`, the rotary tables; both halves of a head turn alike.
        positions: `[batch]` int32, rows of the tables. slots: `[batch]` int32, where key and value go.
        q_norm, k_norm: `[head_dim]`, weights of a norm over each head before RoPE (Qwen3), with `eps`.

    Returns:
        queries `[batch, num_qo_heads, 1, head_dim]` after RoPE and before it, and the key that was
        appended `[batch, num_kv_heads, 1, head_dim]`.

    Raises:
        UsageError: shapes, dtypes or devices that do not go together.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    batch, num_kv_heads, _, head_dim = keys.shape
    check_shape("values", values, tuple(keys.shape))
    parts = qkv.dim() == 3
    check_shape("qkv", qkv, (None, batch, None) if parts else (batch, None))
    check_like("qkv", qkv, keys, (torch.float32,) if parts else ())
    num_qo_heads, odd = divmod(qkv.shape[-1] - 2 * num_kv_heads * head_dim, head_dim)
    if odd or num_qo_heads < 1 or head_dim % 2:
        raise UsageError(
            f"qkv: {qkv.shape[-1]} columns are not query heads and {2 * num_kv_heads} others of {head_dim}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        check_like(name, tensor, keys)
        if tensor.stride(-1) != 1:
            raise UsageError(f"{name}: expected stride 1 along head_dim, got {tensor.stride(-1)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, (None, head_dim // 2))
        check_like(name, table, keys)
    for name, index in (("positions", positions), ("slots", slots)):
        check_shape(name, index, (batch,))
        check_like(name, index, qkv, (torch.int32,))
    if (q_norm is None) != (k_norm is None):
        raise UsageError("q_norm and k_norm come together")
    if not qkv.is_contiguous():
        raise UsageError("qkv: expected a contiguous tensor")
    arguments = (qkv, keys, values, cos, sin, positions, slots, q_norm, k_norm, eps)
    if not use_triton(backend, qkv):
        return reference.rope_append(*arguments)
    from prhs_kernels.ops.rope_append import triton as kernel

    return kernel.rope_append(*arguments)

"""Split a fused projection into heads, rotate queries and key, and append key and value to the cache."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend, check_like, check_shape, use_triton
from prhs_kernels.ops.retrieve.state import GateInputs
from prhs_kernels.ops.rope_append import reference


def rope_append(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: GateInputs | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of one decode step after and before RoPE, and the new key; `keys` and `values` get its row.

    The kernel reads all but `qkv` without waiting for the kernel in front of it, which may overlap with
    the one before (`ops/overlap`): neither may have written any of it.

    Args:
        qkv: `[batch, (num_qo_heads + 2 * num_kv_heads) * head_dim]`, query heads first, then key, then
            value; or `[splits, batch, ...]` fp32 partial sums of `linear_parts`.
        keys, values: `[batch, num_kv_heads, n, head_dim]`, written at `slots` only.
        cos, sin: `[batch, head_dim / 2]` of each sequence's position; both halves of a head turn alike.
        slots: `[batch]` int32, where key and value go.
        q_norm, k_norm: `[head_dim]`, weights of a norm over each head before RoPE (Qwen3), with `eps`.
        gate: decide in the same launch who retrieves, and write the key's low-bit copy if there is one, for
            `retrieve(gated=True)`; kernels only, since the reference's retrieval decides by itself.

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
    if odd or num_qo_heads < 1 or num_qo_heads % num_kv_heads or head_dim % 2:
        raise UsageError(
            f"qkv: {qkv.shape[-1]} columns are not groups of query heads and {2 * num_kv_heads} others of "
            f"{head_dim}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        check_like(name, tensor, keys)
        if tensor.stride(-1) != 1:
            raise UsageError(f"{name}: expected stride 1 along head_dim, got {tensor.stride(-1)}")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_shape(name, angles, (batch, head_dim // 2))
        check_like(name, angles, keys)
    check_shape("slots", slots, (batch,))
    check_like("slots", slots, qkv, (torch.int32,))
    if (q_norm is None) != (k_norm is None):
        raise UsageError("q_norm and k_norm come together")
    if not qkv.is_contiguous():
        raise UsageError("qkv: expected a contiguous tensor")
    arguments = (qkv, keys, values, cos, sin, slots, q_norm, k_norm, eps)
    if not use_triton(backend, qkv):
        if gate is not None:
            raise UsageError("gate: only the kernels decide here; the reference decides in its retrieval")
        return reference.rope_append(*arguments)
    if gate is not None:
        _check_gate(gate, keys, num_qo_heads // num_kv_heads)
    from prhs_kernels.ops.rope_append import triton as kernel

    return kernel.rope_append(*arguments, gate)


def _check_gate(gate: GateInputs, keys: torch.Tensor, group: int) -> None:
    """Raise `UsageError` unless the gate is one of this layer; the rest is checked by `retrieve`."""
    batch, num_kv_heads, n, head_dim = keys.shape
    check_shape("gate.spans", gate.spans, (batch, 4))
    check_shape("gate.budget", gate.budget, (batch, num_kv_heads))
    for name, tensor in (("spans", gate.spans), ("budget", gate.budget)):
        check_like(f"gate.{name}", tensor, keys, (torch.int32,))
        if not tensor.is_contiguous():
            raise UsageError(f"gate.{name}: expected a contiguous tensor")
    anchor = gate.state.anchor_query
    check_shape("gate.state.anchor_query", anchor, (batch, num_kv_heads, group, head_dim))
    check_like("gate.state.anchor_query", anchor, keys)
    copy = gate.key_copy
    if copy is not None:
        check_shape("gate.key_copy.scale", copy.scale, (batch, num_kv_heads, None))
        if copy.head_dim != head_dim or copy.scale.shape[2] < n:
            raise UsageError(f"gate.key_copy: not made for {n} slots of {head_dim}")

"""Rotary embedding and cache update in plain PyTorch."""

from __future__ import annotations

import torch


def rope_append(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results as in `api.rope_append`."""
    batch, num_kv_heads, _, head_dim = keys.shape
    if qkv.dim() == 3:
        qkv = qkv.sum(dim=0).to(keys.dtype)
    heads = qkv.view(batch, -1, head_dim)
    query = heads[:, : -2 * num_kv_heads]
    key, value = heads[:, -2 * num_kv_heads :].chunk(2, dim=1)
    if q_norm is not None and k_norm is not None:
        query = _normed(query, q_norm, eps)
        key = _normed(key, k_norm, eps)
    tables = cos[:, None], sin[:, None]
    rows = torch.arange(batch, device=qkv.device)
    key = _rotated(key, *tables)
    keys[rows, :, slots.long()] = key
    values[rows, :, slots.long()] = value
    return _rotated(query, *tables).unsqueeze(2), query.unsqueeze(2), key.unsqueeze(2)


def _normed(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(heads.dtype)


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

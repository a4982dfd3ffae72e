"""The norm in plain PyTorch."""

from __future__ import annotations

import torch


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `api.rms_norm`."""
    if hidden.dim() == 3:
        hidden = hidden.sum(dim=0).to(weight.dtype)
    total = hidden if residual is None else hidden + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(hidden.dtype), total

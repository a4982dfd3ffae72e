"""The norm in plain PyTorch."""

from __future__ import annotations

import torch


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `api.rms_norm`."""
    total = add(hidden, weight, residual)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(total.dtype), total


def start_norm(
    hidden: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, chunk: int, down: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as in `api.start_norm`; rows, sums of squares per chunk of columns, and the new stream."""
    total = add(hidden, weight, residual)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    squares = [part.square().sum(dim=-1) for part in wide.split(chunk, dim=-1)]
    return (wide * weight * down).to(total.dtype), torch.stack(squares, dim=-1), total


def add(hidden: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The new residual stream; partial sums are rounded first, as a projection would be."""
    if hidden.dim() == 3:
        hidden = hidden.sum(dim=0).to(weight.dtype)
    return hidden if residual is None else hidden + residual

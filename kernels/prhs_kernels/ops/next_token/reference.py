"""The greedy token in plain PyTorch."""

from __future__ import annotations

import math

import torch


def next_token(
    logits: torch.Tensor,
    token: torch.Tensor,
    alive: torch.Tensor,
    drawn: torch.Tensor,
    stop_ids: torch.Tensor,
    last_draw: int,
    slot: torch.Tensor | None,
) -> None:
    """Arguments as in `api.next_token`."""
    token.copy_(argmax(logits))
    alive.logical_and_((token[:, None] != stop_ids).all(dim=-1))
    drawn.add_(1).clamp_(max=last_draw)
    if slot is not None:
        slot.add_(1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """`argmax` in two stages: few long rows occupy a GPU badly. The first of equal ones in both."""
    parts = math.gcd(logits.shape[-1], 64)
    best, place = logits.unflatten(-1, (parts, -1)).max(dim=-1)
    part = best.argmax(dim=-1, keepdim=True)
    return (part * (logits.shape[-1] // parts) + place.gather(-1, part)).squeeze(-1)

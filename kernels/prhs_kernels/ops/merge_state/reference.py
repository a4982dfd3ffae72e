"""Merging attention states in plain PyTorch."""

from __future__ import annotations

import torch


def merge_state(output: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key sets from the attention over each of them.

    Args:
        output: `[..., splits, head_dim]`, each split normalised by itself; not read where lse is -inf.
        lse: `[..., splits]`, natural log-sum-exp of each split's scaled scores; -inf for an empty split.

    Returns:
        output `[..., head_dim]` and lse `[...]`, fp32 or wider; 0 and -inf where every split is empty.
    """
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
    merged = lse.logsumexp(dim=-1)
    weights = (lse - merged.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
    parts = output.to(lse.dtype).masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)
    return (weights.unsqueeze(-1) * parts).sum(dim=-2), merged

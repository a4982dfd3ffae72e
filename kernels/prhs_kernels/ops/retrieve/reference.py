"""Retrieval in plain PyTorch: importance of a position, top-k, dilation (CIS, arXiv 2602.08329)."""

from __future__ import annotations

import torch


def importance(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Probability that a KV head's query group puts on each candidate position, summed over the group.

    Args:
        scores: `[..., group, n]`, scaled dot products of the group's queries with all keys, fp32 or fp64.
        candidates: `[..., n]` bool. Each row needs at least one candidate.

    Returns:
        `[..., n]`, 0 outside the candidates. Every head is normalised over *all* candidates (sinks and local
        positions included) before the sum, so the top k of the result maximise the group's retained mass.
    """
    masked = scores.masked_fill(~candidates.unsqueeze(-2), -torch.inf)
    return masked.softmax(dim=-1).sum(dim=-2)


def top_positions(weights: torch.Tensor, allowed: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Rank of every chosen position in its row: `[..., n]` int32, 0 is best, -1 is not chosen.

    Importance is compared in fp32 and a tie goes to the oldest position, so that the set for a smaller count
    is a prefix of the set for a larger one and does not depend on the other rows of the call.

    Args:
        weights: `[..., n]` nonnegative importance.
        allowed: `[..., n]` bool, positions that may be chosen.
        count: `[...]` int64, how many to choose, at most the number of allowed positions of the row.
    """
    ranks = torch.full(weights.shape, -1, dtype=torch.int32, device=weights.device)
    width = int(count.max()) if count.numel() else 0
    if width == 0:
        return ranks
    # torch.topk breaks ties differently for every width. So, one integer per position: on top the bits of the
    # importance, which order like its value because it is never negative, below the position from the end.
    age = torch.arange(weights.shape[-1] - 1, -1, -1, device=weights.device)
    keyed = (weights.float().view(torch.int32).long() << 32) | age
    best = keyed.masked_fill(~allowed, -1).topk(width, dim=-1).indices
    order = torch.arange(width, device=weights.device, dtype=torch.int32).expand(best.shape)
    chosen = torch.where(order < count.unsqueeze(-1), order, -1)
    return ranks.scatter(-1, best, chosen)


def dilate(
    ranks: torch.Tensor, count: torch.Tensor, radius: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Chosen positions together with the neighbours of the best third: `[..., n]` bool.

    Args:
        ranks: `[..., n]` int32 from `top_positions`.
        count: `[...]` int64, the k that was asked for; the best `k // 3` bring their neighbours.
        radius: `[...]` int, neighbours on either side; 0 leaves the set as it is.
        allowed: `[..., n]` bool, positions that may enter.
    """
    chosen = ranks >= 0
    seeds = chosen & (ranks < (count // 3).unsqueeze(-1))
    grown = chosen.clone()
    for offset in range(1, int(radius.max()) + 1 if radius.numel() else 1):
        reach = seeds & (radius >= offset).unsqueeze(-1)
        grown[..., offset:] |= reach[..., :-offset]
        grown[..., :-offset] |= reach[..., offset:]
    return grown & allowed

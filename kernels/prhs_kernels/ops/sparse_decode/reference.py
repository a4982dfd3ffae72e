"""Attention over kept positions in plain PyTorch: gathered for one step, masked for a run of steps."""

from __future__ import annotations

import torch


def grouped_scores(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot products without repeating the keys.

    Args:
        query: `[batch, num_qo_heads, steps, head_dim]`.
        keys: `[batch, num_kv_heads, n, head_dim]`.

    Returns:
        `[batch, num_kv_heads, group, steps, n]`, in fp32 or wider.
    """
    batch, num_qo_heads, steps, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    packed = query.reshape(batch, num_kv_heads, -1, head_dim)
    scores = torch.matmul(packed, keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    return (scores * scale).view(batch, num_kv_heads, num_qo_heads // num_kv_heads, steps, -1)


def kept_indices(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted positions of a mask, as the kernels take them.

    Args:
        kept: `[batch, num_kv_heads, n]` bool.

    Returns:
        indices `[batch, num_kv_heads, max_kept]` int64, ascending, -1 padded at the end;
        count `[batch, num_kv_heads]` int64.
    """
    count = kept.sum(dim=-1)
    width = int(count.max())
    order = torch.arange(kept.shape[-1], device=kept.device).masked_fill(~kept, kept.shape[-1])
    indices = order.sort(dim=-1).values[..., :width]
    return indices.masked_fill(indices == kept.shape[-1], -1), count


def sparse_decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode step over gathered rows; a row with no index gives zeros and lse -inf.

    Args:
        query: `[batch, num_qo_heads, 1, head_dim]`.
        keys, values: `[batch, num_kv_heads, n, head_dim]`.
        indices: `[batch, num_kv_heads, max_kept]`, -1 padded.

    Returns:
        output `[batch, num_qo_heads, 1, head_dim]` in the query's dtype and the log-sum-exp
        `[batch, num_qo_heads, 1]` in fp32 or wider.
    """
    batch, num_qo_heads, _, head_dim = query.shape
    rows = indices.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, head_dim)
    scores = grouped_scores(query, keys.gather(2, rows), scale)
    scores = scores.masked_fill((indices < 0)[:, :, None, None, :], -torch.inf)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    probs = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)).exp()
    gathered = values.gather(2, rows).unsqueeze(2).to(probs.dtype)
    # a padded row may hold anything, NaN included: 0 * NaN would leak into the sum
    gathered = gathered.masked_fill((indices < 0)[:, :, None, :, None], 0.0)
    output = torch.matmul(probs, gathered).reshape(batch, num_qo_heads, 1, head_dim)
    return output.to(query.dtype), lse.reshape(batch, num_qo_heads, 1)


def attend(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weighted sum of values, the query group packed.

    Args:
        probs: `[batch, num_kv_heads, group, steps, n]`, rows sum to one.
        values: `[batch, num_kv_heads, n, head_dim]`.

    Returns:
        `[batch, num_kv_heads * group, steps, head_dim]` in the values' dtype.
    """
    batch, num_kv_heads, group, steps, n = probs.shape
    output = torch.matmul(probs.reshape(batch, num_kv_heads, group * steps, n).to(values.dtype), values)
    return output.view(batch, num_kv_heads * group, steps, -1)

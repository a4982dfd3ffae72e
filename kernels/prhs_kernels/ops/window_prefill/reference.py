"""Prefill attention over a per-layer window with sinks, by chunks of queries: no T x T mask is made."""

from __future__ import annotations

from collections.abc import Callable

import torch

QUERY_CHUNK = 1024  # rows of the mask that exist at a time


def window_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: Callable[[slice], torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Scaled dot product attention where query row i sees the keys of `visible`.

    Args:
        query: `[batch, num_qo_heads, steps, head_dim]`.
        keys, values: `[batch, num_kv_heads, n, head_dim]`.
        visible: rows -> `[batch, rows, n]` bool, the positions those query rows see.

    Returns:
        `[batch, num_qo_heads, steps, head_dim]`; a row that sees nothing (padding) is 0.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    chunks = []
    for start in range(0, query.shape[2], QUERY_CHUNK):
        rows = slice(start, min(start + QUERY_CHUNK, query.shape[2]))
        mask = visible(rows)
        empty = ~mask.any(dim=-1, keepdim=True)
        # SDPA gives NaN for a row without keys; let padding rows see everything and zero them after
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows], keys, values, attn_mask=(mask | empty).unsqueeze(1), scale=scale
        )
        chunks.append(out.masked_fill(empty.unsqueeze(1), 0.0))
    return torch.cat(chunks, dim=2)

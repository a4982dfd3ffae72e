"""Dense decode attention in plain PyTorch."""

from __future__ import annotations

import torch

from prhs_kernels.ops.spans import span_mask


def dense_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `api.dense_decode`."""
    batch, num_qo_heads, _, head_dim = query.shape
    num_kv_heads, n = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    packed = query.reshape(batch, num_kv_heads, -1, head_dim)
    scores = torch.matmul(packed, keys.transpose(-1, -2)).to(wide) * scale
    if spans is not None:
        hidden = ~span_mask(spans, n)[:, None, None, :]
        scores = scores.masked_fill(hidden, -torch.inf)
        # a slot nobody wrote may hold anything, NaN included: 0 * NaN would leak into the sum
        values = values.masked_fill(hidden.transpose(-1, -2), 0.0)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    probs = (scores - lse.clamp(min=torch.finfo(wide).min)).exp()
    output = torch.matmul(probs, values.to(wide))
    return output.view_as(query).to(query.dtype), lse.view(batch, num_qo_heads, 1)

"""Prefill attention over a window with sinks in plain PyTorch, in chunks of queries: no T x T mask."""

from __future__ import annotations

import torch

QUERY_CHUNK = 1024  # rows of the mask that exist at a time


def window_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    *,
    scale: float,
    window_fraction: float,
    num_sinks: int,
    num_local: int,
    sliding_window: int | None,
) -> torch.Tensor:
    """Arguments and result as in `api.window_prefill`; any dtype that PyTorch's attention takes."""
    steps, n = query.shape[2], keys.shape[2]
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    output = torch.empty_like(query)
    for start in range(0, steps, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, steps)
        slots = torch.arange(n - steps + start, n - steps + end, device=query.device)
        seen = n - steps + end  # slots, the last query's own included
        mask = visible(slots, padding, seen, window_fraction, num_sinks, num_local, sliding_window)
        empty = ~mask.any(dim=-1, keepdim=True)
        # SDPA gives NaN for a row without keys; let padding rows see everything and zero them after
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=(mask | empty).unsqueeze(1),
            scale=scale,
        )
        output[:, :, start:end] = out.masked_fill(empty.unsqueeze(1), 0.0)
    return output


def visible(
    slots: torch.Tensor,
    padding: torch.Tensor,
    n: int,
    window_fraction: float,
    num_sinks: int,
    num_local: int,
    sliding_window: int | None,
) -> torch.Tensor:
    """What the queries at `slots` (`[rows]`) see of n cache slots: `[batch, rows, n]` bool."""
    position = (slots[None, :] - padding[:, None]).unsqueeze(-1)
    key = (torch.arange(n, device=slots.device)[None, :] - padding[:, None]).unsqueeze(1)
    # float64, so that floor() agrees with `SelectorParams.window_start` on every device
    start = (position.double() * window_fraction).floor().long()
    mask = (key >= 0) & (key <= position)
    mask &= (key < num_sinks) | (key >= start) | (key > position - num_local)
    if sliding_window is not None:
        mask &= key > position - sliding_window
    return mask

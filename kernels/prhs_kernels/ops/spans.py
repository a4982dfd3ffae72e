"""Which cache slots a decode step may attend to, as four numbers per sequence."""

from __future__ import annotations

import torch


def candidate_spans(
    kv_len: torch.Tensor,
    padding: torch.Tensor,
    *,
    num_sinks: int = 0,
    num_local: int = 1,
    sliding_window: int | None = None,
    window_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sinks and window of each sequence: `[batch, 4]` int32, slots `[s0, s1)` and `[s2, s3)`, `s1 <= s2`.

    Together they are what `selectors.base.candidates` marks, without a mask. Computed on the device of
    `kv_len`; nothing is read back.

    Args:
        kv_len: `[batch]` int, cache slots in use, the current token's included.
        padding: `[batch]` int, left-padding slots.
        num_sinks: positions at the start that are always kept; num_local: recent ones that PSAW never cuts.
        sliding_window: the model's own window in positions.
        window_start: `[batch]` int, `P_l(t)` of PSAW in positions; None without PSAW.
    """
    end, padding = kv_len.long(), padding.long()
    first = padding if sliding_window is None else torch.maximum(padding, end - sliding_window)
    sink_end = torch.minimum(torch.maximum(padding + num_sinks, first), end)
    begin = sink_end
    if window_start is not None:
        begin = torch.maximum(begin, torch.minimum(padding + window_start.long(), end - num_local))
    return torch.stack([first, sink_end, begin, end], dim=-1).to(torch.int32)


def span_mask(spans: torch.Tensor, n: int) -> torch.Tensor:
    """The same as a mask `[batch, n]` bool."""
    slots = torch.arange(n, device=spans.device)[None, :]
    first, sink_end, begin, end = (spans[:, i, None] for i in range(4))
    return ((slots >= first) & (slots < sink_end)) | ((slots >= begin) & (slots < end))

"""StreamingLLM: attention sinks and a local window, nothing else."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class StreamingLLM:
    """The first `num_sinks` positions and the most recent ones (Xiao et al., arXiv:2309.17453).

    The local window takes what the sinks leave of `size`. With a size of `num_sinks` or less the current
    position comes first and the sinks share the rest; sinks outside the model's own window leave their
    slots to the local window.
    """

    num_sinks: int = 4  # positions, the published setting
    name: str = "streaming-llm"
    retrieval_ratio: float = dataclasses.field(default=0.0, init=False)  # never scores a key

    def select(self, rows: DecodeRows, size: torch.Tensor) -> torch.Tensor:
        """Kept set `[num_kv_heads, num_steps, kv_len_max]` bool of exactly `min(size, visible)`."""
        size = size.minimum(rows.num_visible)
        sinks = (self.num_sinks - rows.first_visible).clamp(min=0).minimum(size - 1).clamp(min=0)
        key = torch.arange(rows.keys.shape[1], device=rows.keys.device)
        is_sink = key < (rows.first_visible + sinks)[..., None]
        is_local = key > (rows.positions - (size - sinks))[..., None]
        return (is_sink | is_local) & rows.visible

    def rows_read(self, rows: DecodeRows, kept: torch.Tensor) -> torch.Tensor:
        """Nothing is scored: K and V of the kept set only."""
        return 2 * kept.sum(-1)

"""StreamingLLM: attention sinks and a local window, nothing else."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Baseline):
    """The first `num_sinks` positions and the most recent ones (Xiao et al., arXiv:2309.17453).

    Ours: keys keep the rotation of the position they were written at (published: of their place in the cache,
    so that no distance exceeds its size). The two differ once something was dropped.

    The local window takes what the sinks leave of `size`. With a size of `num_sinks` or less the current
    position comes first and the sinks share the rest; sinks outside the model's own window leave their
    slots to the local window.
    """

    num_sinks: int = 4  # positions, the published setting
    name = "streaming-llm"

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """A cache of 1,024: 4 sinks and 1,020 recent positions."""
        return (AtBudget(self, tokens=1024),)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Exactly `min(size, visible)`; nothing is scored."""
        count = size.minimum(rows.num_visible)
        sinks = (self.num_sinks - rows.first_visible).clamp(min=0).minimum(count - 1).clamp(min=0)
        key = torch.arange(rows.keys.shape[1], device=rows.keys.device)
        is_sink = key < (rows.first_visible + sinks)[..., None]
        is_local = key > (rows.positions - (count - sinks))[..., None]
        return rows.chosen((is_sink | is_local) & rows.visible, size, retrieved=False)

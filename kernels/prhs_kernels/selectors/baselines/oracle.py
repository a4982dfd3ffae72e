"""Oracle top-k: the best set of a given size, known only after every key was scored."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank


@dataclasses.dataclass(frozen=True)
class OracleTopK(Baseline):
    """Per KV head the `size` positions with the largest probability summed over the group's query heads.

    No other set of that size retains more mass, on average over the group, for this very query
    ("top-k oracle", arXiv:2602.08329). Equal probabilities are taken from the lowest position on.
    """

    name = "oracle"

    def rank(self, rows: DecodeRows) -> torch.Tensor:
        """Place of every position in falling order of mass, `[num_kv_heads, num_steps, kv_len_max]` int64.

        Invisible positions come last. Thresholding it gives the oracle's set for any size from one sort.
        """
        return falling_rank(rows.group_mass, rows.visible)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Exactly `min(size, visible)`; every visible key is scored at every step."""
        kept = (self.rank(rows) < size[..., None]) & rows.visible
        return rows.chosen(kept, size, retrieved=True, extra_rows=rows.num_visible)

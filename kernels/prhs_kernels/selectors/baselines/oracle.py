"""Oracle top-k: the best set of a given size, known only after every key was scored."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class OracleTopK:
    """Per KV head the `size` positions with the largest probability summed over the group's query heads.

    No other set of that size retains more mass, on average over the group, for this very query
    ("top-k oracle", arXiv:2602.08329). Equal probabilities are taken from the lowest position on.
    """

    name: str = "oracle"
    retrieval_ratio: float = dataclasses.field(default=1.0, init=False)  # scores every key at every step

    def rank(self, rows: DecodeRows) -> torch.Tensor:
        """Place of every position in falling order of mass, `[num_kv_heads, num_steps, kv_len_max]` int64.

        Invisible positions come last. Thresholding it gives the oracle's set for any size from one sort.
        """
        order = rows.group_mass.masked_fill(~rows.visible, -1.0).argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, places)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> torch.Tensor:
        """Kept set `[num_kv_heads, num_steps, kv_len_max]` bool of exactly `min(size, visible)`."""
        return (self.rank(rows) < size[..., None]) & rows.visible

    def rows_read(self, rows: DecodeRows, kept: torch.Tensor) -> torch.Tensor:
        """Every visible key is scored at every step, then K and V of the kept set are loaded."""
        return rows.num_visible + 2 * kept.sum(-1)

"""DoubleSparse: top-k by the scores of a few channels, chosen offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from prhs_kernels.errors import InputError
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank


@dataclasses.dataclass(frozen=True, eq=False)
class DoubleSparse(Baseline):
    """Top-k by dot products over label channels, at every step (Yang et al., arXiv:2408.07092).

    Label channels of a KV head are those with the largest mean `|q_c k_c|` on calibration prompts, 1/16 to
    1/4 of the head dimension in the publication.

    Ours: a group of query heads shares channels and set, by the mean of its heads' softmax over label scores
    (published: one set per head); labels are read at the cache's precision (published: a 4-bit copy).
    """

    share: float = 1 / 4  # of head_dim; 8 channels of 32, as many as 1/16 of 128
    order: torch.Tensor | None = None  # [num_layers, num_kv_heads, head_dim] int64, best channel first
    name = "double-sparse"
    needs_fit = True

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """1/16 of the channels and of the positions."""
        sixteenth = dataclasses.replace(self, share=1 / 16)
        return (AtBudget(sixteenth, fraction=1 / 16, label="1/16, 1/16 of d"),)

    def fitted(self, prompts: Iterable[Sequence[DecodeRows]]) -> DoubleSparse:
        """With the channels of these prompts' rows."""
        total = sum(torch.stack([channel_weight(rows) for rows in layers]) for layers in prompts)
        if not isinstance(total, torch.Tensor):
            raise InputError(f"{self.name}: no prompts to choose the channels on")
        return dataclasses.replace(self, order=total.argsort(dim=-1, descending=True, stable=True))

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Exactly `min(size, visible)`; the label channels of every visible key are read at every step."""
        if self.order is None:
            raise InputError(f"{self.name}: its channels are chosen on calibration prompts; fit it first")
        head_dim = rows.keys.shape[2]
        count = max(round(self.share * head_dim), 1)
        channels = self.order[rows.layer][:, None, :count].to(rows.keys.device)
        keys = rows.keys.gather(2, channels.expand(-1, rows.keys.shape[1], -1)).float()
        query = rows.by_group(rows.query)
        query = query.gather(3, channels[:, None].expand(*query.shape[:3], -1)).float()
        scores = (query @ keys[:, None].mT * rows.scale).masked_fill(~rows.visible, -torch.inf)
        estimate = scores.softmax(-1).mean(1)
        kept = (falling_rank(estimate, rows.visible) < size[..., None]) & rows.visible
        labels = -(-rows.num_visible * count // head_dim)
        return rows.chosen(kept, size, retrieved=True, extra_rows=labels)


def channel_weight(rows: DecodeRows) -> torch.Tensor:
    """Mean `|q_c k_c|` over steps, their visible keys and the group, `[num_kv_heads, head_dim]` float64."""
    seen = rows.visible.double() @ rows.keys.abs().double() / rows.num_visible[:, None]
    return (rows.by_group(rows.query).abs().double() * seen[:, None]).mean((1, 2))

"""Quest: pages of keys, chosen by an upper bound of their attention logits."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank


@dataclasses.dataclass(frozen=True)
class Quest(Baseline):
    """Pages whose elementwise key minimum and maximum allow the largest logit (arXiv:2406.10774).

    As published: pages of 16, the newest page always, no sinks. Two things the publication leaves open or
    does otherwise, so that methods compare at equal effective budget: a group of query heads shares one set,
    chosen by the largest bound of its heads (published: one set per query head); and no layer is exempt
    (published: the first two are dense, as in `published`).
    """

    page_size: int = 16  # positions
    name = "quest"

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """1,024 positions, within the 512 to 4,096 of the published code."""
        return (AtBudget(self, tokens=1024, dense_layers=(0, 1)),)

    def page_bounds(self, rows: DecodeRows) -> torch.Tensor:
        """Upper bound of `q . k` over the keys of each page, `[num_qo_heads, num_steps, num_pages]` float32.

        Covers all keys of a page, also those behind a query; the last page may hold fewer than `page_size`.
        """
        length = rows.keys.shape[1]
        padding = -length % self.page_size
        pages = torch.nn.functional.pad(rows.keys.float(), (0, 0, 0, padding), value=torch.nan)
        pages = pages.reshape(rows.num_kv_heads, -1, self.page_size, rows.keys.shape[2])
        # the padding of the last page must win neither comparison
        low = pages.nan_to_num(nan=torch.inf).amin(2).repeat_interleave(rows.group_size, 0)
        high = pages.nan_to_num(nan=-torch.inf).amax(2).repeat_interleave(rows.group_size, 0)
        query = rows.query.float()
        return query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Whole pages, the count nearest to `size`; scores page summaries instead of keys, at every step.

        The page of the current position counts with the positions it holds so far and is always kept. Read
        are the minimum and maximum of every older page with a visible key.
        """
        bounds = rows.by_group(self.page_bounds(rows)).amax(1)
        page = torch.arange(bounds.shape[-1], device=bounds.device)
        newest = rows.positions // self.page_size
        oldest = rows.first_visible // self.page_size
        candidate = (page < newest[:, None]) & (page >= oldest[:, None])
        in_newest = rows.positions % self.page_size + 1
        count = ((size - in_newest).clamp(min=0) / self.page_size).round()
        chosen = (falling_rank(bounds, candidate) < count[..., None]) & candidate
        chosen = chosen | (page == newest[:, None])
        kept = chosen.repeat_interleave(self.page_size, -1)[..., : rows.keys.shape[1]] & rows.visible
        return rows.chosen(kept, size, retrieved=True, extra_rows=2 * (newest - oldest))

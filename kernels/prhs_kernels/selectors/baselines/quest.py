"""Quest: pages of keys, chosen by an upper bound of their attention logits."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class Quest:
    """Pages whose elementwise key minimum and maximum allow the largest logit (arXiv:2406.10774).

    As published: pages of 16, the newest page always, no sinks. Two things the publication leaves open or
    does otherwise, so that methods compare at equal effective budget: a group of query heads shares one set,
    chosen by the largest bound of its heads (published: one set per query head); and no layer is exempt
    (published: the first two are dense).
    """

    page_size: int = 16  # positions
    name: str = "quest"
    retrieval_ratio: float = dataclasses.field(
        default=1.0, init=False
    )  # scores at every step, though page summaries instead of keys

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

    def select(self, rows: DecodeRows, size: torch.Tensor) -> torch.Tensor:
        """Kept set `[num_kv_heads, num_steps, kv_len_max]` bool: whole pages, the count nearest to `size`.

        The page of the current position counts with the positions it holds so far and is always kept.
        """
        bounds = rows.by_group(self.page_bounds(rows)).amax(1)
        page = torch.arange(bounds.shape[-1], device=bounds.device)
        newest = rows.positions // self.page_size
        candidate = (page < newest[:, None]) & (page >= (rows.first_visible // self.page_size)[:, None])
        order = bounds.masked_fill(~candidate, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, page.expand_as(order))
        in_newest = rows.positions % self.page_size + 1
        count = ((size - in_newest).clamp(min=0) / self.page_size).round()
        chosen = ((rank < count[..., None]) & candidate) | (page == newest[:, None])
        kept = chosen.repeat_interleave(self.page_size, -1)[..., : rows.keys.shape[1]]
        return kept & rows.visible

    def rows_read(self, rows: DecodeRows, kept: torch.Tensor) -> torch.Tensor:
        """Minimum and maximum of every older page with a visible key, then K and V of the kept pages."""
        older = rows.positions // self.page_size - rows.first_visible // self.page_size
        return 2 * older + 2 * kept.sum(-1)

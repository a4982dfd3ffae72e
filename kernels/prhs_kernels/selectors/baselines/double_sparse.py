"""DoubleSparse: top-k by the scores of a few channels, chosen offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from prhs_kernels.errors import InputError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind, dequantise, quantise
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank

INT4 = KeyCopyKind.INT4


@dataclasses.dataclass(frozen=True, eq=False)
class DoubleSparse(Baseline):
    """Top-k by dot products over label channels, at every step (Yang et al., arXiv:2408.07092).

    Label channels of a KV head are those with the largest mean `|q_c k_c|` on calibration prompts. A channel
    sparsity of 1/16 is one of bits: a quarter of the channels in 4 bits, against 16 in the cache.

    Ours: a group of query heads shares channels and set, by the mean of its heads' softmax over label scores
    (published: one set per head); a channel counts with all keys that a query sees (published code: with the
    key of its own position); 4-bit labels are symmetric, queries stay exact (published code: from minimum to
    maximum, both). At matched budgets labels have the cache's precision and no layer is exempt (published:
    4 bits, the first two layers dense).
    """

    share: float = 1 / 4  # of head_dim
    four_bits: bool = False  # labels of four bits with a scale per position, instead of the cache's precision
    order: torch.Tensor | None = None  # [num_layers, num_kv_heads, head_dim] int64, best channel first
    name = "double-sparse"
    needs_fit = True

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """1/16 of the positions by labels of 1/16 of the bits; the first two layers are dense."""
        labels = dataclasses.replace(self, share=1 / 4, four_bits=True)
        name = "1/16, d/4 in 4 bits"
        return (AtBudget(labels, fraction=1 / 16, dense_layers=(0, 1), label=name),)

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
        count += count % 2 * self.four_bits  # two codes are a byte
        channels = self.order[rows.layer][:, None, :count].to(rows.keys.device)
        labels = rows.keys.gather(2, channels.expand(-1, rows.keys.shape[1], -1))
        per_key = 2 * count  # bytes, in a cache of 16 bits
        if self.four_bits:
            labels = dequantise(*quantise(labels, INT4), INT4)
            per_key = INT4.scan_bytes(count, 2)
        query = rows.by_group(rows.query)
        query = query.gather(3, channels[:, None].expand(*query.shape[:3], -1)).float()
        scores = (query @ labels.float()[:, None].mT * rows.scale).masked_fill(~rows.visible, -torch.inf)
        estimate = scores.softmax(-1).mean(1)
        kept = (falling_rank(estimate, rows.visible) < size[..., None]) & rows.visible
        scanned = -(-rows.num_visible * per_key // (2 * head_dim))
        return rows.chosen(kept, size, retrieved=True, extra_rows=scanned)


def channel_weight(rows: DecodeRows) -> torch.Tensor:
    """Mean `|q_c k_c|` over steps, their visible keys and the group, `[num_kv_heads, head_dim]` float64."""
    seen = rows.visible.double() @ rows.keys.abs().double() / rows.num_visible[:, None]
    return (rows.by_group(rows.query).abs().double() * seen[:, None]).mean((1, 2))

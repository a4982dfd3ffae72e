"""Twilight: as many positions as an estimated mass needs."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind, dequantise, quantise
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class Twilight(Baseline):
    """Top-p: the smallest set whose estimated mass reaches p (Lin et al., arXiv:2502.02770).

    The estimate is attention over a 4-bit copy of all keys: the variant that publication calls full, without
    a coarser selector in front.

    Ours: a group of query heads shares one set, which reaches p on average over its heads (published: one per
    head); the copy is symmetric with one scale per position, as our own low-bit scans have it (published:
    from minimum to maximum); at matched budgets no layer is exempt (published: the first two are dense).
    """

    p: float = 0.95  # estimated mass to keep, in (0, 1]
    name = "twilight"
    exact = False  # p decides

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """The two values of p in use there, by model; the first two layers are dense."""
        return tuple(dataclasses.replace(self.at(p), dense_layers=(0, 1)) for p in (0.85, 0.95))

    def at(self, dial: float) -> AtBudget:
        """The dial is p."""
        return AtBudget(dataclasses.replace(self, p=dial), fraction=1.0, label=f"p = {dial:.3g}")

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """At most `size`; the 4-bit copy of every visible key is read at every step.

        Its bytes count against a cache of 16 bits.
        """
        estimate = self.estimate(rows)
        order = estimate.argsort(dim=-1, descending=True, stable=True)
        ordered = estimate.gather(-1, order)
        # a position is needed as long as those before it fall short of p
        needed = ordered.cumsum(-1) - ordered < self.p
        needed &= torch.arange(needed.shape[-1], device=needed.device) < size[..., None]
        kept = torch.zeros_like(needed).scatter_(-1, order, needed) & rows.visible
        head_dim = rows.keys.shape[2]
        scanned = rows.num_visible * KeyCopyKind.INT4.scan_bytes(head_dim, 2)
        return rows.chosen(kept, kept.sum(-1), retrieved=True, extra_rows=-(-scanned // (2 * head_dim)))

    @staticmethod
    def estimate(rows: DecodeRows) -> torch.Tensor:
        """Attention over the 4-bit keys, group mean, `[num_kv_heads, num_steps, kv_len_max]` float32."""
        keys = dequantise(*quantise(rows.keys, KeyCopyKind.INT4), KeyCopyKind.INT4)
        scores = rows.by_group(rows.query).float() @ keys[:, None].mT * rows.scale
        return scores.masked_fill(~rows.visible, -torch.inf).softmax(-1).mean(1)

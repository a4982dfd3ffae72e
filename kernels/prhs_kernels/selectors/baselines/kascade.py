"""Kascade: exact top-k in anchor layers, reused head by head in the layers between."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from prhs_kernels.errors import InputError
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.reuse import anchor_of, best_anchors, select_by_anchor, similarity
from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class Kascade(Baseline):
    """Anchor layers by dynamic programming over the similarity of layers (Deshmukh et al., arXiv:2512.16391).

    The anchors are those that serve all layers best on calibration prompts; in between, each KV head takes
    the set of the anchor's KV head that serves it best. Layer 0 is always an anchor.

    Ours: 5 anchors of 32 layers as published, as many in proportion for other depths, at least 2; similarity
    is averaged over rows and layers have equal weight (published: the worst rows, layers weighted by
    importance). At equal effective budget layer 0 keeps its own top-k (published: everything, as in
    `published`). Only decode steps are sparse.
    """

    anchors_per_layer: float = 5 / 32
    anchors: tuple[int, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()  # [layer][KV head] the anchor's KV head
    name = "kascade"
    needs_fit = True

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """A tenth of the positions, at least 128; layer 0 is dense."""
        return (AtBudget(self, fraction=0.1, tokens=128, full_layers=(0,)),)

    def fitted(self, prompts: Iterable[Sequence[DecodeRows]]) -> Kascade:
        """With the anchors and heads that serve these prompts' rows best."""
        table = similarity(prompts, self.name)
        layers = table.shape[0]
        count = min(max(math.ceil(layers * self.anchors_per_layer), 2), layers)
        anchors = best_anchors(table.amax(-1).mean(-1), count)
        heads = tuple(
            tuple(table[anchor_of(anchors, layer), layer].argmax(-1).tolist()) for layer in range(layers)
        )
        return dataclasses.replace(self, anchors=anchors, heads=heads)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Exactly `min(size, visible)`; anchor layers score every key."""
        if not self.anchors:
            raise InputError(f"{self.name}: its anchor layers depend on the model; fit it first")
        return select_by_anchor(rows, size, self.anchors, self.heads[rows.layer])

"""Anchor layers: what methods that reuse a layer's top-k in later layers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from prhs_kernels.errors import InputError
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank

TOP_SHARE = 0.1  # of the visible positions, in the sets whose similarity between layers is measured


def select_by_anchor(
    rows: DecodeRows, size: torch.Tensor, anchors: Sequence[int], heads: Sequence[int] | None = None
) -> Choice:
    """Exact top-k in an anchor layer, which scores every key; the last anchor's order of positions elsewhere.

    heads: for each KV head of a later layer the anchor's KV head whose order it takes; None is its own.
    """
    if rows.layer in anchors:
        rank = falling_rank(rows.group_mass, rows.visible)
        rows.memory.notes["rank"] = rank
        kept = (rank < size[..., None]) & rows.visible
        return rows.chosen(kept, size, retrieved=True, extra_rows=rows.num_visible)
    rank = rows.memory.notes["rank"]
    if heads is not None:
        rank = rank[list(heads)]
    # a layer may see less than its anchor did, when only some layers have a window of their own
    return rows.chosen((rank < size[..., None]) & rows.visible, size, retrieved=False)


def similarity(prompts: Iterable[Sequence[DecodeRows]], name: str) -> torch.Tensor:
    """How well an anchor's top-k serves a later layer, `[anchor, layer, head, anchor's head]` float64.

    Mean over rows of the layer's mass on the anchor's set over its mass on its own set of as many positions;
    0 where the anchor comes after the layer.
    """
    sums = []
    for layers in prompts:
        top = []
        for rows in layers:
            count = (rows.num_visible * TOP_SHARE).ceil()[:, None]
            rank = falling_rank(rows.group_mass, rows.visible)
            top.append(((rank < count) & rows.visible).double())
        sums.append(torch.stack([_served(rows, top, later) for later, rows in enumerate(layers)], dim=1))
    if not sums:
        raise InputError(f"{name}: no prompts to choose the layers on")
    return torch.stack(sums).mean(0)


def _served(rows: DecodeRows, top: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
    """`[anchor, head, anchor's head]` of one layer on one prompt."""
    mass = rows.group_mass.double()
    own = (mass * top[layer]).sum(-1)
    served = [torch.einsum("hsn,asn->has", mass, anchor) / own[:, None] for anchor in top[: layer + 1]]
    table = torch.stack(served).mean(-1)
    return torch.nn.functional.pad(table, (0, 0, 0, 0, 0, len(top) - 1 - layer))


def best_anchors(served: torch.Tensor, count: int) -> tuple[int, ...]:
    """The `count` anchor layers, layer 0 among them, that serve all layers best: dynamic programming.

    served: `[anchor, layer]`; each layer is served by the last anchor at or before it.
    """
    layers = served.shape[0]
    # best[first]: score and anchors of the layers from `first` on, an anchor at `first`, few anchors so far
    best: list[tuple[float, tuple[int, ...]]] = [
        (float(served[first, first:].sum()), (first,)) for first in range(layers)
    ]
    for _ in range(count - 1):
        longer = []
        for first in range(layers):
            options = [best[first]]
            for then in range(first + 1, layers):
                score, anchors = best[then]
                options.append((float(served[first, first:then].sum()) + score, (first, *anchors)))
            longer.append(max(options, key=lambda option: option[0]))
        best = longer
    return best[0][1]


def anchor_of(anchors: Sequence[int], layer: int) -> int:
    """The last anchor at or before a layer."""
    return max(anchor for anchor in anchors if anchor <= layer)

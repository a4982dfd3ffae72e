"""TidalDecode: one selection serves the layers behind it, until the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from prhs_kernels.errors import InputError
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.reuse import anchor_of, select_by_anchor, similarity
from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class TidalDecode(Baseline):
    """Top-k of a selection layer, reused until a re-selection layer (Yang et al., arXiv:2410.05076).

    The first `full` layers attend to everything, the one behind them selects, one in the middle selects
    again. Which one is a property of the model, found offline: ours is the layer whose set serves the rest
    best.

    Ours: a group of query heads shares one set, by its mean attention (published: one per head). To compare
    at equal effective budget no layer is exempt: the first layers and the selecting ones keep their own exact
    top-k (published: all of them attend to everything, as in `published`). The periodic correction of the
    cache by full attention is left out.
    """

    full: int = 2  # layers
    again: int | None = None  # the re-selection layer
    name = "tidal-decode"
    needs_fit = True

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """256 positions, the default of the published code, with full attention where it has that."""
        selecting = (self.full, self.full if self.again is None else self.again)
        return (AtBudget(self, tokens=256, dense_layers=tuple(range(self.full)), full_layers=selecting),)

    @property
    def _anchors(self) -> tuple[int, ...]:
        if self.again is None:
            raise InputError(f"{self.name}: its re-selection layer depends on the model; fit it first")
        return (*range(self.full + 1), self.again)

    def fitted(self, prompts: Iterable[Sequence[DecodeRows]]) -> TidalDecode:
        """With the re-selection layer that serves these prompts' rows best."""
        served = similarity(prompts, self.name).diagonal(dim1=2, dim2=3).mean(-1)
        layers = served.shape[0]

        def score(again: int) -> float:
            anchors = (*range(self.full + 1), again)
            return sum(float(served[anchor_of(anchors, layer), layer]) for layer in range(layers))

        behind = range(min(self.full + 1, layers - 1), layers)
        return dataclasses.replace(self, again=max(behind, key=score))

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Exactly `min(size, visible)`; selecting layers score every key."""
        return select_by_anchor(rows, size, self._anchors)

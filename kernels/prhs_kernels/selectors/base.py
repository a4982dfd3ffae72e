"""Which slots of the cache a decode step may attend to, before any selector has chosen among them.

A *slot* is an index into the cache of a left-padded batch; slot `pad + p` of a row holds its position `p`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import torch

from prhs_kernels.params import SelectorParams

if TYPE_CHECKING:
    from prhs_kernels.selectors.baselines.rows import DecodeRows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query rows of one layer: where they stand and what the unmodified model lets them see.

    slots: `[steps]` int64, cache slot of each query (the same for every row of the batch).
    padding: `[batch]` int64, number of left-padding slots.
    kv_slots: number of cache slots after this update.
    sliding_window: the model's own window in positions, or None.
    """

    slots: torch.Tensor
    padding: torch.Tensor
    kv_slots: int
    sliding_window: int | None = None

    @property
    def positions(self) -> torch.Tensor:
        """`[batch, steps]` int64, negative on padding."""
        return self.slots[None, :] - self.padding[:, None]

    @property
    def num_visible(self) -> torch.Tensor:
        """Positions that dense attention of each query covers: `[batch, steps]` int64, 0 on padding."""
        return (self.positions + 1).clamp(min=0, max=self.sliding_window)

    def key_positions(self) -> torch.Tensor:
        """`[batch, kv_slots]` int64, negative on padding."""
        return torch.arange(self.kv_slots, device=self.slots.device)[None, :] - self.padding[:, None]

    def visible(self) -> torch.Tensor:
        """What dense attention covers: `[batch, steps, kv_slots]` bool."""
        keys, queries = self.key_positions()[:, None, :], self.positions[:, :, None]
        mask = (keys >= 0) & (keys <= queries)
        if self.sliding_window is not None:
            mask &= keys > queries - self.sliding_window
        return mask


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What a `StepSelector` decided for a run of steps.

    kept: `[num_kv_heads, steps, n]` bool. retrieved, contested: `[num_kv_heads, steps]` bool, keys were
    scored; per-step top-k would have scored them. rows_read: the same shape, int64, rows of K and V
    (`head_dim` elements each) that were loaded, scans included.
    """

    kept: torch.Tensor
    retrieved: torch.Tensor
    contested: torch.Tensor
    rows_read: torch.Tensor


class StepSelector(Protocol):
    """Another method in the place of the three axes, for comparison.

    It keeps no state of its own: what a later layer or step needs goes to `rows.memory.notes`, which is empty
    at the first step behind a prefill.
    """

    def choose(self, rows: DecodeRows) -> Choice:
        """Sets of a run of decode steps of one layer of one unpadded sequence.

        A run goes through the layers in order; keys behind a step belong to later steps of the same run.
        """


def candidates(rows: Rows, params: SelectorParams, layer: int) -> torch.Tensor:
    """What PSAW leaves of the visible positions: `[batch, steps, kv_slots]` bool (arXiv 2602.08329, PSAW).

    Sinks stay, as does everything from `P_l(t)` on.
    """
    mask = rows.visible()
    if params.depth is None or params.depth.window_fraction(layer, params.num_layers) == 0.0:
        return mask
    keys = rows.key_positions()[:, None, :]
    start = params.window_start(layer, rows.positions.clamp(min=0)).unsqueeze(-1)
    # the local window is never cut: with a very short context P_l(t) could otherwise reach into it
    local = keys > rows.positions.unsqueeze(-1) - params.num_local
    return mask & ((keys < params.num_sinks) | (keys >= start) | local)

"""Open loop: any selector applied to the decode rows of the dense model, teacher forced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from prhs_kernels.params import SelectorParams
from prhs_kernels.selectors import cis
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.selectors.baselines import DecodeRows
from prhs_kernels.selectors.memory import Memory

if TYPE_CHECKING:
    from prhs_calibration.corpus import Prompt
    from prhs_kernels.runtime.attention import LayerObservation


class Sets(Protocol):
    """What the evaluation reads of a selection, without a batch dimension; a `Choice` is one too."""

    @property
    def kept(self) -> torch.Tensor:
        """`[num_kv_heads, steps, n]` bool."""

    @property
    def retrieved(self) -> torch.Tensor:
        """`[num_kv_heads, steps]` bool, keys were scanned."""

    @property
    def contested(self) -> torch.Tensor:
        """`[num_kv_heads, steps]` bool, per-step top-k would have scanned."""

    @property
    def rows_read(self) -> torch.Tensor:
        """`[num_kv_heads, steps]`, rows of K and V loaded, scan and gate included."""


Replay = Callable[["Prompt", "Callable[[LayerObservation], None]"], None]
"""Runs the dense model over a prompt and shows each layer's decode rows to the observer."""


class _PreHocSets:
    def __init__(self, selection: cis.Selection, allowed: torch.Tensor, params: SelectorParams) -> None:
        self.kept, self.retrieved = selection.kept[0], selection.retrieved[0]
        self.contested = selection.contested[0]
        scanned = params.scan_row * (self.retrieved * allowed[0].sum(-1))
        # the same accounting as DecodeStats: a gate reads one anchor query per query head
        self.rows_read = 2 * self.kept.sum(-1) + scanned + params.group_size * selection.gated[0]


def decode_rows(observation: LayerObservation, memory: Memory | None = None) -> DecodeRows:
    """The observed layer as the comparison methods take it; `memory` of one method on one prompt."""
    visible = observation.visible
    window_start = observation.positions + 1 - visible.sum(-1)
    return DecodeRows(
        query=observation.query[0],
        keys=observation.keys[0],
        dense_probs=observation.dense_probs,
        positions=observation.positions,
        window_start=window_start if bool((window_start > 0).any()) else None,
        layer=observation.layer,
        scale=observation.scale,
        memory=Memory() if memory is None else memory,
    )


def prehoc_sets(observation: LayerObservation, params: SelectorParams) -> Sets:
    """Sets that the time and depth axes of `params` choose for the dense model's own queries and keys.

    The selection is the one that generation runs. Freezing (the layer axis) acts through hidden states, which
    an open loop leaves dense, so it has no effect here.
    """
    rows = _rows(observation)
    allowed = candidates(rows, params, observation.layer)
    if params.time is None:
        kept = allowed[:, None].expand(-1, params.num_kv_heads, -1, -1)
        nothing = torch.zeros_like(kept[..., 0])
        return _PreHocSets(cis.Selection(kept, nothing, nothing, nothing), allowed, params)
    selection, _ = cis.select(
        observation.query,
        observation.query_pre,
        lambda: cis.scan_scores(observation.query, observation.keys, observation.scale, params.key_copy),
        allowed,
        rows,
        params,
        observation.layer,
        None,
    )
    return _PreHocSets(selection, allowed, params)


def _rows(observation: LayerObservation) -> Rows:
    covered = observation.visible.sum(-1)
    windowed = bool((covered < observation.positions + 1).any())
    return Rows(
        slots=observation.positions,
        padding=torch.zeros(1, dtype=torch.int64, device=observation.positions.device),
        kv_slots=observation.visible.shape[-1],
        # a step that sees less than its whole past fills the model's own window exactly
        sliding_window=int(covered.max()) if windowed else None,
    )


def steps_since_retrieval(retrieved: torch.Tensor) -> torch.Tensor:
    """Decode steps since a head last retrieved, `[num_kv_heads, steps]` int64; -1 before the first time."""
    step = torch.arange(retrieved.shape[-1], device=retrieved.device).expand(retrieved.shape)
    last = torch.where(retrieved, step, -1).cummax(-1).values if retrieved.numel() else step
    return torch.where(last >= 0, step - last, -1)

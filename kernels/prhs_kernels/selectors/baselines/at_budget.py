"""A comparison method at a fixed attended fraction, as the runtime takes it: closed loop, layer by layer."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.selectors.base import Choice, Rows
from prhs_kernels.selectors.baselines.rows import Baseline, DecodeRows, uniform_size


@dataclasses.dataclass(frozen=True)
class AtBudget:
    """`method` with the same fraction of the visible positions in every layer, head and step.

    What it keeps and reads is counted as it happens, so that methods which keep whole pages can be compared
    at the budget they really had.
    """

    method: Baseline
    fraction: float  # of the visible positions, in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"budget {self.fraction} must be a fraction of the visible positions in (0, 1]")

    def choose(
        self, query: torch.Tensor, keys: torch.Tensor, dense_probs: torch.Tensor, rows: Rows
    ) -> Choice:
        """Sets of a run of steps; see `prhs_kernels.selectors.base.StepSelector`."""
        positions = rows.positions[0]
        start = None if rows.sliding_window is None else positions + 1 - rows.sliding_window
        steps = DecodeRows(query, keys, dense_probs, positions, start)
        size = uniform_size(steps, self.fraction)
        kept = self.method.select(steps, size)
        contested = size < steps.num_visible
        # all of these methods score at every step or never
        retrieved = contested if self.method.retrieval_ratio else torch.zeros_like(contested)
        return Choice(kept, retrieved, contested, self.method.rows_read(steps, kept))

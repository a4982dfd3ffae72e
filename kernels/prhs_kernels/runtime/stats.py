"""What a decode run read and kept, summed over (step, layer, KV head) units (words: docs/notation.md)."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.cis import Selection


@dataclasses.dataclass
class DecodeStats:
    """Sums over units; rows are K or V vectors of one position and KV head. Tensors stay on their device.

    A scanned key of a low-bit copy counts as the fraction of a row that it takes in a cache of 16-bit values.
    """

    units: int = 0
    kept: torch.Tensor | float = 0.0
    fraction: torch.Tensor | float = 0.0  # sum of kept / visible
    visible: torch.Tensor | float = 0.0
    retrieved: torch.Tensor | float = 0.0
    contested: torch.Tensor | float = 0.0
    rows_read: torch.Tensor | float = 0.0

    def add(
        self,
        kept: torch.Tensor,
        visible: torch.Tensor,
        candidates: torch.Tensor,
        selection: Selection | None,
        group: int,
        scan_row: float = 1.0,
    ) -> None:
        """Record a run of steps of one layer.

        Args:
            kept: `[batch, num_kv_heads, steps, n]` bool; visible, candidates: `[batch, steps, n]` bool.
            selection: what CIS decided, None when the time axis is off in this layer.
            group: query heads per KV head; the gate reads that many anchor rows.
            scan_row: rows that one scanned position costs, `SelectorParams.scan_row`.
        """
        self.rows_read = self.rows_read + 2 * self._count(kept, visible)
        if selection is None:
            return
        scanned = (selection.retrieved * candidates.sum(-1)[:, None, :]).double().sum()
        self.retrieved = self.retrieved + selection.retrieved.double().sum()
        self.contested = self.contested + selection.contested.double().sum()
        self.rows_read = self.rows_read + scan_row * scanned + group * selection.gated.double().sum()

    def add_choice(self, choice: Choice, visible: torch.Tensor) -> None:
        """Record a run of steps of one layer of a single sequence; visible: `[1, steps, n]` bool."""
        self._count(choice.kept[None], visible)
        self.retrieved = self.retrieved + choice.retrieved.double().sum()
        self.contested = self.contested + choice.contested.double().sum()
        self.rows_read = self.rows_read + choice.rows_read.double().sum()

    def _count(self, kept: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Sizes of the sets; the number of positions kept."""
        count, seen = kept.sum(-1).double(), visible.sum(-1).double()[:, None, :]
        total = count.sum()
        self.units += count.numel()
        self.kept = self.kept + total
        self.visible = self.visible + seen.sum() * kept.shape[1]
        self.fraction = self.fraction + (count / seen).sum()
        return total

    def add_dense(self, visible_rows: torch.Tensor, heads: int) -> None:
        """Record dense steps: `visible_rows` `[batch, steps]` positions, read by each of `heads` KV heads."""
        total = visible_rows.double().sum() * heads
        units = visible_rows.numel() * heads
        self.units += units
        self.kept, self.visible = self.kept + total, self.visible + total
        self.fraction, self.rows_read = self.fraction + units, self.rows_read + 2 * total

    def merged(self, other: DecodeStats) -> DecodeStats:
        """Sums of two runs."""
        names = [field.name for field in dataclasses.fields(self)]
        return DecodeStats(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def retrieval_ratio(self) -> float:
        """ρ: retrievals done over those per-step top-k would do; NaN when nothing ever had to be chosen."""
        return _ratio(self.retrieved, self.contested)

    @property
    def effective_budget(self) -> float:
        """Mean number of kept positions per unit."""
        return _ratio(self.kept, self.units)

    @property
    def attended_fraction(self) -> float:
        """Mean of kept / visible per unit."""
        return _ratio(self.fraction, self.units)

    @property
    def kv_bytes_read(self) -> float:
        """K and V bytes read, scans and gates included, as a fraction of dense attention's."""
        return _ratio(self.rows_read, 2 * self.visible)

    def to_dict(self) -> dict[str, float]:
        """The four figures of a report, under the names of docs/notation.md."""
        names = ("retrieval_ratio", "effective_budget", "attended_fraction", "kv_bytes_read")
        return {name: getattr(self, name) for name in names}


def _ratio(numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> float:
    below = float(denominator)
    return float(numerator) / below if below else float("nan")

"""Who is audited, and what has been found so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import num_sms


@dataclasses.dataclass(frozen=True)
class AuditTotals:
    """Sums over units (step, sequence, KV head) of their dropped mass, each the mean of its group.

    A unit is exact where its mass is known without a coin: a retrieval on exact keys, or a head that keeps
    everything (mass 0). All others were audited with the coin's probability.
    """

    exact_mass: float
    exact_units: int
    audited_mass: float
    audited_units: int
    other_units: int


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAudit:
    """What a layer needs of an audit, views of a `StepAudit`.

    coin: `[batch, num_kv_heads]` int32, 1 for a unit to be audited in this step. lse: `[batch, num_kv_heads,
    group]` fp32, written for such units: the log-sum-exp of all candidates' scores, on exact keys.
    """

    coin: torch.Tensor
    lse: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class StepAudit:
    """Audits of all layers of a step, on the device, so that coins are drawn and masses counted at once.

    probability: of the coin. seeds: `[layers]` int64, so that layers draw independently.
    step: `[1]` int64, number of the decode step, counted up by the caller: the coin is a function of seed,
    step and row, so that a captured graph draws anew in every replay.
    coin: `[layers, batch, num_kv_heads]` int32 and lse: `[layers, batch, num_kv_heads, group]` fp32, see
    `LayerAudit`. sums: `[layers, 2]` fp64 and units: `[layers, 3]` int64, the fields of `AuditTotals`.
    """

    probability: float
    seeds: torch.Tensor
    step: torch.Tensor
    coin: torch.Tensor
    lse: torch.Tensor
    sums: torch.Tensor
    units: torch.Tensor

    @classmethod
    def allocate(
        cls, probability: float, seeds: Sequence[int], batch: int, num_kv_heads: int, group: int,
        device: torch.device | str, step: torch.Tensor | None = None,
    ) -> StepAudit:  # fmt: skip
        """A seed per layer, totals of zero; step: the tensor that audits share, a new one if None.

        Raises:
            UsageError: a probability outside of [0, 1].
        """
        if not 0.0 <= probability <= 1.0:
            raise UsageError(f"audit probability = {probability} must be between 0 and 1")
        heads = (len(seeds), batch, num_kv_heads)
        return cls(
            probability=probability,
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
            step=torch.zeros(1, dtype=torch.int64, device=device) if step is None else step,
            coin=torch.zeros(heads, dtype=torch.int32, device=device),
            lse=torch.zeros(*heads, group, dtype=torch.float32, device=device),
            sums=torch.zeros(len(seeds), 2, dtype=torch.float64, device=device),
            units=torch.zeros(len(seeds), 3, dtype=torch.int64, device=device),
        )

    @property
    def limit(self) -> int:
        """Largest draw of 31 bits with which the coin falls; -1 for never."""
        return round(self.probability * 2**31) - 1

    def layer(self, place: int) -> LayerAudit:
        """Of the layer that has this seed."""
        return LayerAudit(self.coin[place], self.lse[place])

    def reset(self) -> None:
        """Forget what was found."""
        self.sums.zero_()
        self.units.zero_()

    def totals(self) -> AuditTotals:
        """Of all layers, copied to the host."""
        exact_mass, audited_mass = self.sums.sum(dim=0).tolist()
        exact, audited, other = self.units.sum(dim=0).tolist()
        return AuditTotals(exact_mass, exact, audited_mass, audited, other)


@dataclasses.dataclass(frozen=True, eq=False)
class ScanScratch:
    """Memory of `scan_units`; layers may share it.

    parts: `[2, batch * num_kv_heads, group, pieces]` fp32, what programs found. counters: `[batch *
    num_kv_heads]` int32, finished pieces, zero between scans.
    """

    parts: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def allocate(cls, batch: int, num_kv_heads: int, group: int, device: torch.device) -> ScanScratch:
        """For as many pieces of a head as there are programs."""
        rows = batch * num_kv_heads
        parts = torch.empty(2, rows, group, num_sms(device) + 1, dtype=torch.float32, device=device)
        return cls(parts, torch.zeros(rows, dtype=torch.int32, device=device))

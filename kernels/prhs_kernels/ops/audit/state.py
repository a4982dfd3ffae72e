"""Who is audited, and what has been found so far."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.errors import UsageError


@dataclasses.dataclass(frozen=True)
class AuditTotals:
    """Sums of a layer over units (step, sequence, KV head) of their dropped mass, each the mean of its group.

    A unit is exact where its mass is known without a coin: a retrieval on exact keys, or a head that keeps
    everything (mass 0). All others were audited with the coin's probability.
    """

    exact_mass: float
    exact_units: int
    audited_mass: float
    audited_units: int
    other_units: int


def limit_of(probability: float) -> int:
    """Largest draw of 31 bits with which a coin falls; -1 for never."""
    return round(probability * 2**31) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAudit:
    """Audits of one layer, on the device. `heads` means `[batch, num_kv_heads]`.

    probability: of the coin. seed: of the layer, so that layers draw independently.
    step: `[1]` int64, number of the decode step, counted up by the caller: the coin is a function of seed,
    step and row, so that a captured graph draws anew in every replay.
    coin: heads int32, 1 for a unit that is audited in this step. lse: `[batch, num_kv_heads, group]` fp32,
    the log-sum-exp of its scores over all candidates, on exact keys.
    sums: `[2]` fp64 and units: `[3]` int64, the fields of `AuditTotals`.
    """

    probability: float
    seed: int
    step: torch.Tensor
    coin: torch.Tensor
    lse: torch.Tensor
    sums: torch.Tensor
    units: torch.Tensor

    @classmethod
    def allocate(
        cls, probability: float, seed: int, batch: int, num_kv_heads: int, group: int,
        device: torch.device | str, step: torch.Tensor | None = None,
    ) -> LayerAudit:  # fmt: skip
        """Totals of zero; step: the tensor that layers share, a new one if None.

        Raises:
            UsageError: a probability outside of [0, 1].
        """
        if not 0.0 <= probability <= 1.0:
            raise UsageError(f"audit probability = {probability} must be between 0 and 1")
        return cls(
            probability=probability,
            seed=seed,
            step=torch.zeros(1, dtype=torch.int64, device=device) if step is None else step,
            coin=torch.zeros(batch, num_kv_heads, dtype=torch.int32, device=device),
            lse=torch.zeros(batch, num_kv_heads, group, dtype=torch.float32, device=device),
            sums=torch.zeros(2, dtype=torch.float64, device=device),
            units=torch.zeros(3, dtype=torch.int64, device=device),
        )

    @property
    def limit(self) -> int:
        """Largest draw of 31 bits with which the coin falls; -1 for never."""
        return limit_of(self.probability)

    def totals(self) -> AuditTotals:
        """Copied to the host."""
        exact_mass, audited_mass = self.sums.tolist()
        exact, audited, other = self.units.tolist()
        return AuditTotals(exact_mass, exact, audited_mass, audited, other)

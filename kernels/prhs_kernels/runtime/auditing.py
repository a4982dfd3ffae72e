"""Counting what a decode run drops, in either loop; what the counts say is `runtime/audit.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.audit.state import AuditTotals
from prhs_kernels.runtime.audit import Audit

BUSY = 0.1  # share of the (step, layer) pairs in which something is scanned


def affordable_share(rows: int) -> float:
    """Probability of the coin that `auto` means for a batch of `rows` (sequence, KV head) pairs.

    A scan costs its latency in a layer where anybody is audited, hardly more where many are. So what decides
    is in how many (step, layer) pairs anything is scanned: with p = 0.1 / rows in a tenth of them at most.
    """
    return BUSY / rows


class Auditor:
    """The counts of one run of the reference loop: retrievals and full sets exactly, others by a coin.

    The coin has a generator of its own, so that it depends neither on the masses nor on the sampled tokens.
    """

    def __init__(self, probability: float, seed: int) -> None:
        if not 0 < probability <= 1:
            raise UsageError(f"audit = {probability} must be in (0, 1]: the share of units that is measured")
        self._generator = torch.Generator().manual_seed(seed)
        self.audit = Audit(0.0, 0.0, 0.0, 0.0, 0.0, probability)

    def add(
        self,
        scores: Callable[[], torch.Tensor],
        kept: torch.Tensor,
        retrieved: torch.Tensor,
        visible: torch.Tensor,
        alive: torch.Tensor | None,
    ) -> None:
        """Count one decode step of one layer.

        Args:
            scores: gives the scaled dot products `[batch, num_kv_heads, group, 1, n]`; called only if needed.
            kept: `[batch, num_kv_heads, 1, n]` bool; retrieved: `[batch, num_kv_heads, 1]` bool.
            visible: `[batch, 1, n]` bool, what dense attention covers.
            alive: `[batch]` bool, sequences that still count; None for all.
        """
        counts = torch.ones_like(retrieved) if alive is None else alive[:, None, None].expand_as(retrieved)
        complete = (kept | ~visible[:, None]).all(dim=-1)
        coin = torch.rand(retrieved.shape, generator=self._generator) < self.audit.probability
        exact, known = counts & (retrieved | complete), counts & retrieved & ~complete
        picked = counts & ~exact & coin.to(counts.device)
        mass = torch.zeros(retrieved.shape, dtype=torch.float64, device=retrieved.device)
        if bool((known | picked).any()):
            mass = dropped_mass(scores(), kept, visible).double()
        found = {
            "exact_units": exact,
            "exact_mass": mass * known,
            "other_units": counts & ~exact,
            "audited_units": picked,
            "audited_mass": mass * picked,
        }
        sums = torch.stack([table.double().sum() for table in found.values()]).tolist()
        self.audit = merged(
            [self.audit, dataclasses.replace(self.audit, **dict(zip(found, sums, strict=True)))]
        )


def dropped_mass(scores: torch.Tensor, kept: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Dense attention outside the kept sets, mean over the group: `[batch, num_kv_heads, steps]`.

    Args:
        scores: `[batch, num_kv_heads, group, steps, n]`; kept: `[batch, num_kv_heads, steps, n]` bool;
            visible: `[batch, steps, n]` bool.
    """
    probs = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
    return probs.masked_fill(kept.unsqueeze(2), 0.0).sum(dim=-1).mean(dim=2)


def merged(audits: Sequence[Audit]) -> Audit:
    """Sums of several runs, or of the heads of several ranks, with the same coin."""
    names = [field.name for field in dataclasses.fields(Audit) if field.name != "probability"]
    sums = {name: sum(getattr(audit, name) for audit in audits) for name in names}
    return Audit(**sums, probability=audits[0].probability)


def totals(found: Sequence[AuditTotals], dense_units: float, probability: float) -> Audit:
    """What the decode engine counted by layer; dense_units: of layers that keep everything: exact."""
    return Audit(
        exact_units=dense_units + sum(layer.exact_units for layer in found),
        exact_mass=sum(layer.exact_mass for layer in found),
        other_units=sum(layer.other_units for layer in found),
        audited_units=sum(layer.audited_units for layer in found),
        audited_mass=sum(layer.audited_mass for layer in found),
        probability=probability,
    )

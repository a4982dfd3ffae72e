"""The audit of a run of the decode engine: coins before each step, what it dropped behind it.

Where a retrieval sees all that dense attention sees, its own scan tells the mass, and another one is made
for units that a coin picks. In layers whose window (PSAW) hides positions no unit's mass is known without a
look at them, so a coin picks from all units that drop anything. Nothing may have been released.
"""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.audit.api import count_dropped, draw_coins, scan_units
from prhs_kernels.ops.audit.state import LayerAudit, ScanScratch, StepAudit
from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.retrieve.state import RetrievalState
from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.audit import Audit
from prhs_kernels.runtime.auditing import totals


@dataclasses.dataclass(frozen=True, eq=False)
class AuditCoin:
    """The coin of a run: its probability, a seed, and the number of the step `[1]` int64 on the device."""

    probability: float
    seed: int
    step: torch.Tensor

    def for_layers(self, layers: list[int], batch: int, params: SelectorParams) -> StepAudit:
        """Coins and totals of layers, each with a seed of its own: they draw independently."""
        heads, group = params.num_kv_heads, params.group_size
        seeds, device = [self.seed + layer for layer in layers], self.step.device
        return StepAudit.allocate(self.probability, seeds, batch, heads, group, device, self.step)


def windowed_layers(params: SelectorParams) -> list[int]:
    """Layers that cannot see their oldest positions."""
    depth, layers = params.depth, params.num_layers
    return [] if depth is None else [at for at in range(layers) if depth.window_fraction(at, layers) > 0]


class RunAudit:
    """What is audited in a step, and the totals; choosing: layers that have sets, as the state has them.

    scans: coins of the layers whose retrievals see everything, for `retrieve`.
    """

    def __init__(
        self, params: SelectorParams, choosing: list[int], batch: int, coin: AuditCoin, backend: Backend
    ) -> None:
        self._coin, self._backend = coin, backend
        self._exact = params.key_copy == KeyCopyKind.EXACT
        hidden = windowed_layers(params)
        seeing = [layer for layer in choosing if layer not in hidden]
        assert seeing == choosing[: len(seeing)], "windows begin at a layer and go on to the last"
        self._seeing, self._hidden = (
            coin.for_layers(layers, batch, params) if layers else None for layers in (seeing, hidden)
        )
        self.scans: dict[int, LayerAudit] = {}
        if self._seeing is not None:
            self.scans = {layer: self._seeing.layer(place) for place, layer in enumerate(seeing)}
        self._places = {layer: place for place, layer in enumerate(hidden)}
        if self._hidden is not None:
            self._decision = torch.zeros_like(self._hidden.coin)
            heads, group = params.num_kv_heads, params.group_size
            self._scratch = ScanScratch.allocate(batch, heads, group, coin.step.device)
        # of a step, by layer; kept until its end, so that nothing else lies in their memory in a graph
        self._lse: dict[int, torch.Tensor] = {}

    @property
    def _audits(self) -> list[StepAudit]:
        return [audit for audit in (self._seeing, self._hidden) if audit is not None]

    def begin(self) -> None:
        """Before the layers of a step: toss the coins."""
        self._lse.clear()
        for audit in self._audits:
            draw_coins(audit, backend=self._backend)

    def record(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, plan: StepPlan, lse: torch.Tensor,
        count: torch.Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        """After a layer has attended to sets of log-sum-exp `lse` `[batch, num_qo_heads, 1]`.

        count: `[batch, num_kv_heads]` int32, their sizes; None where the layer keeps what its spans cover.
        """
        self._lse[layer] = lse
        if self._hidden is not None and (place := self._places.get(layer)) is not None:
            scan_units(
                query, keys, self._hidden.layer(place), spans=plan.spans[layer],
                visible=plan.visible[layer], decision=self._decision[place], scale=scale, count=count,
                scratch=self._scratch, backend=self._backend,
            )  # fmt: skip

    def end(self, state: RetrievalState | None, alive: torch.Tensor) -> None:
        """After the layers of a step: count what it dropped; the next one draws other coins.

        state: the sets of all layers that choose any. alive: `[batch]` bool, sequences that count.
        """
        if (audit := self._seeing) is not None:
            assert state is not None
            rows = audit.coin.shape[0] * audit.coin.shape[1]
            decision, lse = state.decision[:rows].view_as(audit.coin), state.lse[:rows].view_as(audit.lse)
            count_dropped(
                self._kept(list(self.scans)), audit, decision=decision, lse=lse if self._exact else None,
                alive=alive, backend=self._backend,
            )  # fmt: skip
        if self._hidden is not None:
            kept = self._kept(list(self._places))
            count_dropped(kept, self._hidden, decision=self._decision, alive=alive, backend=self._backend)
        self._coin.step.add_(1)

    def _kept(self, layers: list[int]) -> torch.Tensor:
        return torch.stack([self._lse[layer] for layer in layers]).float()

    def reset(self) -> None:
        """Forget what was found."""
        for audit in self._audits:
            audit.reset()

    def changing(self) -> list[torch.Tensor]:
        """What a step adds to."""
        return [self._coin.step, *(table for audit in self._audits for table in (audit.sums, audit.units))]

    def totals(self, dense_units: float) -> Audit:
        """Copied to the host; dense_units: of layers that keep everything."""
        return totals([audit.totals() for audit in self._audits], dense_units, self._coin.probability)

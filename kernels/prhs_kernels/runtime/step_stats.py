"""Statistics of decode steps, counted on the device for all layers together and read once at the end."""

from __future__ import annotations

import torch

from prhs_kernels.ops.retrieve.state import Decision, RetrievalState
from prhs_kernels.params import Gate
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.runtime.step_plan import StepPlan

FIELDS = ("units", "kept", "fraction", "visible", "retrieved", "contested", "rows_read")


class StepCounter:
    """Sums over steps, per layer and sequence: `[layers, batch, 7]` float64 on the device, `FIELDS` last.

    selecting: layers that choose sets, in the order of the stacked `state`, whose leading axis is layer and
    sequence. gate: `[selecting, 1, num_kv_heads]` of the parameters, block: the same.
    """

    def __init__(
        self, layers: int, batch: int, num_kv_heads: int, group: int, device: torch.device,
        state: RetrievalState | None = None, selecting: list[int] | None = None,
        gate: torch.Tensor | None = None, block: torch.Tensor | None = None, windows_move: bool = True,
    ) -> None:  # fmt: skip
        self.totals = torch.zeros(layers, batch, len(FIELDS), dtype=torch.float64, device=device)
        self._heads, self._group, self._batch = num_kv_heads, group, batch
        self._state, self._windows_move = state, windows_move
        if state is not None:
            assert selecting is not None and gate is not None and block is not None
            self._layers = torch.tensor(selecting, device=device)
            self._gate, self._block = gate.to(device), block.to(device)
            self._anchor = torch.empty_like(state.anchor_slot)

    def begin(self) -> None:
        """Before the layers of a step run: remember whom the gate will compare with."""
        if self._state is not None:
            self._anchor.copy_(self._state.anchor_slot)

    def end(self, plan: StepPlan, alive: torch.Tensor) -> None:
        """After the layers have run; `alive` `[batch]` bool, sequences that still count."""
        spans = plan.spans.long()
        candidates = (spans[..., 1] - spans[..., 0] + spans[..., 3] - spans[..., 2])[..., None]
        heads = torch.ones(self._heads, dtype=torch.long, device=spans.device)
        kept, zero = candidates * heads, torch.zeros_like(candidates * heads)
        retrieved = contested = scanned = zero
        if self._state is not None:
            kept, retrieved, contested, scanned = self._selected(plan, candidates, kept, zero)
        visible = plan.visible[..., None]
        sums = [
            heads.expand_as(kept),
            kept,
            kept.double() / visible,
            visible * heads,
            retrieved,
            contested,
            2 * kept + scanned,
        ]
        counted = torch.stack([value.double().sum(dim=-1) for value in sums], dim=-1)
        self.totals.add_(counted * alive[:, None])

    def _selected(
        self, plan: StepPlan, candidates: torch.Tensor, kept: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """kept, retrieved, contested and rows scanned or gated, `[layers, batch, num_kv_heads]`."""
        state, at = self._state, self._layers
        assert state is not None
        shape = (at.numel(), self._batch, self._heads)
        decision, anchor = state.decision.view(shape), self._anchor.view(shape)
        chose = decision != int(Decision.KEEP_ALL)
        fetched = decision == int(Decision.RETRIEVE)
        since = plan.slots[at][..., None] - anchor
        gated = chose & (anchor >= 0) & (since < self._block) & (self._gate != int(Gate.NEVER))
        inside = self._inside(plan.spans[at]) if self._windows_move else state.count.view(shape)
        rows = fetched * candidates[at] + self._group * gated
        return (
            kept.index_copy(0, at, torch.where(chose, inside.long(), kept[at])),
            zero.index_copy(0, at, fetched.long()),
            zero.index_copy(0, at, chose.long()),
            zero.index_copy(0, at, rows),
        )

    def _inside(self, spans: torch.Tensor) -> torch.Tensor:
        """Indices of every set that are still inside the spans."""
        assert self._state is not None
        indices = self._state.indices.view(spans.shape[0], self._batch, self._heads, -1)
        first, sink_end, window = (spans[..., i, None, None] for i in range(3))
        used = torch.arange(indices.shape[-1], device=indices.device) < self._state.count.view(
            indices.shape[:3]
        ).unsqueeze(-1)
        inside = (indices >= window) | ((indices >= first) & (indices < sink_end))
        return (used & inside).sum(dim=-1)

    def reset(self) -> None:
        self.totals.zero_()

    def read(self) -> DecodeStats:
        """The sums as they stand; waits for the device."""
        sums = dict(zip(FIELDS, self.totals.sum(dim=(0, 1)).tolist(), strict=True))
        return DecodeStats(units=int(sums.pop("units")), **sums)

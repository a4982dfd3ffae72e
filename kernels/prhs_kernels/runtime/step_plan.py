"""What every layer may see and keep in a decode step, computed on the device once per step for all layers."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.params import SelectorParams

NO_WINDOW = 2**31 - 1  # a sliding window that nothing leaves


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """One decode step; `layers` is every layer of the model.

    positions: `[batch]` int32 of the new token. slots: `[layers, batch]` int32, where its key goes.
    spans: `[layers, batch, 4]` int32, see `ops.spans`. visible: `[layers, batch]` int64, positions that dense
    attention covers. budget: `[layers, batch, num_kv_heads]` int32, as `cis.middle_budget`.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    spans: torch.Tensor
    visible: torch.Tensor
    budget: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Planner:
    """The constants behind a `StepPlan`, on the device.

    fraction: `[layers, 1]` float64, PSAW's released fraction. window: `[layers, 1]` int64, the model's own
    sliding window. ratio, tokens: `[layers, 1, num_kv_heads]` float64 and int64; None without a time axis.
    padding: `[batch]` int64. shift: `[layers, 1]` int64, slots that a released cache layer starts later.
    """

    num_sinks: int
    num_local: int
    fraction: torch.Tensor
    window: torch.Tensor
    ratio: torch.Tensor | None
    tokens: torch.Tensor | None
    padding: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def create(
        cls, params: SelectorParams, windows: list[int | None], batch: int, device: torch.device
    ) -> Planner:
        """For sequences without padding and a cache that keeps everything; both may be changed in place."""
        layers, time = params.num_layers, params.time

        depth = params.depth
        released = [0.0 if depth is None else depth.window_fraction(layer, layers) for layer in range(layers)]
        return cls(
            num_sinks=params.num_sinks,
            num_local=params.num_local,
            fraction=torch.tensor(released, dtype=torch.float64, device=device)[:, None],
            window=torch.tensor([[NO_WINDOW if w is None else w] for w in windows], device=device),
            ratio=None if time is None else time.budget_ratio[:, None].to(device).double(),
            tokens=None if time is None else time.budget_tokens[:, None].to(device).long(),
            padding=torch.zeros(batch, dtype=torch.long, device=device),
            shift=torch.zeros(layers, 1, dtype=torch.long, device=device),
        )

    def plan(self, slot: torch.Tensor) -> StepPlan:
        """The step whose token stands at cache slot `slot` (`[1]` int64, before any shift)."""
        layers, batch = self.window.shape[0], self.padding.shape[0]
        end, position = slot + 1, slot - self.padding
        visible = torch.minimum(position + 1, self.window)
        first = torch.maximum(self.padding, end - self.window)
        sink_end = torch.minimum(torch.maximum(self.padding + self.num_sinks, first), end)
        start = (position.double() * self.fraction).floor().long()
        begin = torch.minimum(self.padding + start, end - self.num_local)
        begin = torch.maximum(sink_end, begin)
        slots = (slot - self.shift).expand(layers, batch)
        spans = self._stored(first, sink_end, begin, slots + 1)
        return StepPlan(
            positions=position.int(),
            slots=slots.int(),
            spans=spans.int(),
            visible=visible,
            budget=self._budget(visible),
        )

    def _stored(
        self, first: torch.Tensor, sink_end: torch.Tensor, begin: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Spans in slots of the stored layer: where a layer is shifted, each row's sinks stand in front."""
        moved = self.shift > 0
        sinks = [
            torch.where(moved, (edge - self.padding).clamp(max=self.num_sinks), edge)
            for edge in (first, sink_end)
        ]
        return torch.stack([*sinks, begin - self.shift, end], dim=-1)

    def _budget(self, visible: torch.Tensor) -> torch.Tensor:
        if self.ratio is None or self.tokens is None:
            return visible.int()[..., None]
        seen = visible[..., None]
        budget = (self.ratio * seen).floor().long() + self.tokens
        return torch.where(self.ratio >= 1, seen, budget).int()

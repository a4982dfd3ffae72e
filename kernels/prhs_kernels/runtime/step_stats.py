"""Statistics of decode steps, counted on the device for all layers together and read once at the end."""

from __future__ import annotations

import torch

from prhs_kernels.ops.step_count.api import FIELDS, ChosenSets, step_count
from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.index_sets import IndexSets
from prhs_kernels.runtime.run_audit import windowed_layers
from prhs_kernels.runtime.stats import DecodeStats


class StepCounter:
    """Sums over steps; `totals` `[layers, batch, 7]` float64 stay on the device until they are read."""

    def __init__(self, params: SelectorParams, batch: int, sets: IndexSets, device: torch.device) -> None:
        layers, self._params = params.num_layers, params
        self.totals = torch.zeros(layers, batch, len(FIELDS), dtype=torch.float64, device=device)
        self._group, self._scan_row, self._backend = params.group_size, params.scan_row, sets.backend
        self._sets: ChosenSets | None = None
        if sets.stacked is not None:
            order = {layer: place for place, layer in enumerate(sets.rules)}
            places = [order.get(layer, -1) for layer in range(layers)]
            self._sets = ChosenSets(
                state=sets.stacked,
                place=torch.tensor(places, dtype=torch.int32, device=device),
                gate=torch.stack([rule.gate for rule in sets.rules.values()]),
                block=torch.stack([rule.block for rule in sets.rules.values()]),
                anchor=torch.empty_like(sets.stacked.anchor_slot),
            )

    def begin(self) -> None:
        """Before the layers of a step run: remember whom the gate will compare with."""
        if self._sets is not None:
            self._sets.anchor.copy_(self._sets.state.anchor_slot)

    def end(self, plan: StepPlan, alive: torch.Tensor) -> None:
        """After the layers have run; `alive` `[batch]` bool, sequences that still count."""
        step_count(
            self.totals, plan, alive, self._sets, self._group,
            scan_row=self._scan_row, backend=self._backend,
        )  # fmt: skip

    def units_without(self, sets: IndexSets) -> float:
        """Units of the layers that keep everything; waits for the device."""
        dropping = [*sets.states, *windowed_layers(self._params)]
        others = [layer for layer in range(self.totals.shape[0]) if layer not in dropping]
        return float(self.totals[others, :, 0].sum()) if others else 0.0

    def reset(self) -> None:
        self.totals.zero_()

    def read(self) -> DecodeStats:
        """The sums as they stand; waits for the device."""
        sums = dict(zip(FIELDS, self.totals.sum(dim=(0, 1)).tolist(), strict=True))
        return DecodeStats(units=int(sums.pop("units")), **sums)

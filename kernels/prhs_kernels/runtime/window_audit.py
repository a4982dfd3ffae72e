"""Audits of layers whose window (PSAW) hides positions from the scan of a retrieval.

Their dropped mass is known of no unit without a look at everything that dense attention sees. A coin picks
units, and one dense pass over just these gives their log-sum-exp. Nothing may have been released.
"""

from __future__ import annotations

import torch

from prhs_kernels.ops.audit.reference import philox
from prhs_kernels.ops.audit.state import AuditTotals, limit_of
from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.params import SelectorParams

AHEAD = 64  # steps whose coins are drawn together
SPLITS = 16  # programs per head: few heads have anything to read, and these should not take long


def windowed_layers(params: SelectorParams) -> list[int]:
    """Layers that cannot see their oldest positions."""
    depth, layers = params.depth, params.num_layers
    return [] if depth is None else [at for at in range(layers) if depth.window_fraction(at, layers) > 0]


class WindowAudit:
    """Coins of a step and totals of a run, on the device.

    `heads` means `[layers with a window, batch, num_kv_heads]`. coin: heads bool. mass: `[1]` fp64; units:
    `[3]` int64: exact (nothing dropped), audited, all but the exact ones. A step keeps, by layer, the
    log-sum-exp of the sets and of what dense attention sees; the latter is -inf without a coin.
    """

    def __init__(
        self, params: SelectorParams, batch: int, probability: float, seed: int, step: torch.Tensor,
        backend: Backend,
    ) -> None:  # fmt: skip
        self._layers = windowed_layers(params)
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        self._limit, self._seed, self._step, self._backend = limit_of(probability), seed, step, backend
        heads, device = (len(self._layers), batch, params.num_kv_heads), step.device
        self._index = torch.tensor(self._layers, device=device)
        self._units = torch.arange(len(self._layers) * batch * params.num_kv_heads, device=device).view(heads)
        self.coin = torch.zeros(heads, dtype=torch.bool, device=device)
        self.spans = torch.zeros(*heads, 4, dtype=torch.int32, device=device)
        self._group = params.group_size
        self._kept: list[torch.Tensor] = []
        self._whole: list[torch.Tensor] = []
        self._ahead = torch.zeros(AHEAD, *heads, dtype=torch.bool, device=device)  # coins, by step % AHEAD
        self._drawn = 0  # of them for steps to come
        self.mass = torch.zeros(1, dtype=torch.float64, device=device)
        self.units = torch.zeros(3, dtype=torch.int64, device=device)

    def prepare(self) -> None:
        """Before each step, outside of its graph: draws take many kernels, so those of many steps at once."""
        if self._drawn == 0:
            places = torch.arange(AHEAD, device=self._step.device)
            steps = self._step + (places - self._step) % AHEAD  # this one, and those that follow it
            draws = philox(self._seed, steps[:, None, None, None] * self._units.numel() + self._units)
            self._ahead.copy_((draws & 0x7FFFFFFF) <= self._limit)
            self._drawn = AHEAD
        self._drawn -= 1

    def begin(self, plan: StepPlan) -> None:
        """Toss the coins of a step; who lost has nothing to be read, the others all that is visible."""
        self._kept.clear()
        self._whole.clear()
        self.coin.copy_(self._ahead.index_select(0, self._step % AHEAD)[0])
        end = plan.spans[self._index, :, 3]
        begin = end - plan.visible[self._index]
        seen = torch.stack([begin, begin, begin, end], dim=-1)[:, :, None]
        self.spans.copy_(torch.where(self.coin[..., None], seen, 0))

    def record(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lse: torch.Tensor,
        scale: float,
    ) -> None:  # fmt: skip
        """After a layer has attended to sets of log-sum-exp `lse` `[batch, num_qo_heads, 1]`."""
        place = self._place.get(layer)
        if place is None:
            return
        # heads as sequences: spans are per sequence, and a head without a coin reads nothing
        alone = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (keys, values))
        rows = query.reshape(-1, self._group, 1, query.shape[-1])
        spans = self.spans[place].flatten(0, 1)
        _, whole = dense_decode(
            rows, *alone, scale=scale, spans=spans, num_splits=SPLITS, backend=self._backend
        )
        self._kept.append(lse)
        self._whole.append(whole)

    def end(self, plan: StepPlan, counts: dict[int, torch.Tensor], alive: torch.Tensor) -> None:
        """Add up a step.

        counts: `[batch, num_kv_heads]` sizes of the sets of layers that choose any; the others keep what
        their spans cover. alive: `[batch]` bool, sequences that count.
        """
        spans = plan.spans[self._index]
        covered = spans[..., 1] - spans[..., 0] + spans[..., 3] - spans[..., 2]
        sizes = [
            counts.get(layer, covered[place][:, None]).expand_as(self.coin[place])
            for place, layer in enumerate(self._layers)
        ]
        living = alive[None, :, None].expand_as(self.coin)
        complete = torch.stack(sizes) == plan.visible[self._index][..., None]
        others = living & ~complete
        audited = others & self.coin
        kept, whole = (torch.stack(each).view(*living.shape, -1) for each in (self._kept, self._whole))
        dropped = (1.0 - (kept - whole).exp()).clamp(min=0.0).mean(dim=-1).double()
        self.mass.add_(torch.where(audited, dropped, 0.0).sum())
        self.units.add_(torch.stack([(living & complete).sum(), audited.sum(), others.sum()]))

    def reset(self) -> None:
        """Forget what was found."""
        self.mass.zero_()
        self.units.zero_()

    def changing(self) -> list[torch.Tensor]:
        """What a step adds to."""
        return [self.mass, self.units]

    def totals(self) -> AuditTotals:
        """Copied to the host."""
        exact, audited, other = self.units.tolist()
        return AuditTotals(0.0, exact, float(self.mass), audited, other)

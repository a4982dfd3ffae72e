"""A decode step of a batch and everything it changes: cache, sets, counts, the tokens that come next."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.step_plan.api import PlanRule, StepPlan, step_plan
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.audit import Audit
from prhs_kernels.runtime.decoder_step import Attend, DecoderStep
from prhs_kernels.runtime.index_sets import IndexSets
from prhs_kernels.runtime.progress import Progress
from prhs_kernels.runtime.run_audit import AuditCoin
from prhs_kernels.runtime.static_cache import StaticCache
from prhs_kernels.runtime.step_stats import StepCounter
from prhs_kernels.runtime.support import sliding_windows


class BatchStep:
    """Buffers of one run, and the step that works on them; nothing in it is read by the host.

    cache: keys and values, empty until there is a prompt. rule: what spans and budgets follow from. logits:
    `[batch, vocabulary]` of the last step, None before it. counter: what was read and kept. attention: what
    runs in the place of ours, if set.
    """

    def __init__(
        self, model: PreTrainedModel, params: SelectorParams, max_len: int, backend: Backend,
        progress: Progress, coin: AuditCoin | None,
    ) -> None:  # fmt: skip
        windows, device = sliding_windows(model), model.device
        batch = progress.token.shape[0]
        self.backend: Backend = backend
        self.progress, self.cache = progress, StaticCache()
        self.rule = PlanRule.create(params, windows, batch, device)
        self.sets = IndexSets(params, windows, batch, max_len, model.dtype, device, backend, coin)
        self.logits: torch.Tensor | None = None
        self._decoder = DecoderStep(model, max_len, backend)
        self.counter = StepCounter(params, batch, self.sets, device)
        self.attention: Attend | None = None

    def restart(self, length: int, padding: torch.Tensor) -> None:
        """Begin decoding behind `length` slots: nothing chosen, nothing counted, nothing drawn."""
        self.progress.slot.fill_(length)
        self.progress.restart()
        self.rule.padding.copy_(padding)
        self.rule.shift.zero_()
        self.sets.reset()
        self.counter.reset()

    def plan(self) -> StepPlan:
        """Of the step that comes next."""
        return step_plan(self.progress.slot, self.rule, backend=self.backend)

    def run(self) -> None:
        """The step: device work only, so that it can be captured."""
        now, plan = self.progress, self.plan()
        self.counter.begin()
        if (audit := self.sets.audit) is not None:
            audit.begin()
        attend = self.attention or self._attend
        caches = self.cache.keys, self.cache.values
        logits = self._decoder(now.token, plan, *caches, attend, self.sets.gate)
        self.logits = logits  # the last one recorded is the graph's
        self.counter.end(plan, now.alive)
        if audit is not None:
            audit.end(self.sets.stacked, now.alive)
        now.draw(logits, self.backend, steps=True)

    def scale(self, layer: int) -> float:
        """The model's factor on the dot products of a layer."""
        return self._decoder.layers[layer].scale

    def _attend(
        self, layer: int, query: torch.Tensor, query_pre: torch.Tensor, key: torch.Tensor, plan: StepPlan
    ) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        scale = self.scale(layer)
        output, lse = self.sets.attend(layer, query, query_pre, key, keys, values, plan, scale)
        if (audit := self.sets.audit) is not None:
            state = self.sets.states.get(layer)
            audit.record(layer, query, keys, plan, lse, None if state is None else state.count, scale)
        return output

    def changing(self) -> list[torch.Tensor]:
        """Every tensor that a step writes, but the cache, whose new slots are not read before written."""
        return [*self.progress.changing(), self.counter.totals, *self.sets.changing()]

    def audit(self) -> Audit | None:
        """The mass dropped so far, if there is a coin; waits for the device."""
        audit = self.sets.audit
        return None if audit is None else audit.totals(self.counter.units_without(self.sets))

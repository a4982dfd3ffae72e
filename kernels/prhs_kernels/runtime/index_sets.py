"""The index sets of all layers of a decode run, and attention over them."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.state import RetrievalRule, RetrievalScratch, RetrievalState, capacity_for
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.params import Gate, SelectorParams, TimeParams


def selecting_layers(time: TimeParams) -> list[int]:
    """Layers in which some head does not simply keep everything."""
    return [layer for layer, ratio in enumerate(time.budget_ratio) if bool((ratio < 1).any())]


def set_capacity(params: SelectorParams, windows: list[int | None], max_len: int) -> int:
    """Indices per head that no set of these parameters can exceed in a cache of `max_len` slots."""
    time = params.time
    assert time is not None
    most = 16
    for layer in selecting_layers(time):
        seen = min(max_len, windows[layer] or max_len)
        for head in range(params.num_kv_heads):
            ratio = float(time.budget_ratio[layer, head])
            budget = seen if ratio >= 1 else int(ratio * seen) + int(time.budget_tokens[layer, head])
            shares = int(time.gate[layer, head]) != Gate.NEVER
            block = min(int(time.block[layer, head]), max_len) if shares else 1
            dilation = int(time.dilation[layer, head])
            most = max(most, capacity_for(budget, params.num_sinks, params.num_local, dilation, block))
    return min(most, -(-max_len // 16) * 16)


class IndexSets:
    """Sets of the layers that choose any; the other layers attend to everything in their spans.

    stacked: one state for all of them, its leading axis is layer and sequence, so that a step is counted at
    once; states: views of it by layer. rules: their CIS parameters by layer. None and empty without any.
    """

    def __init__(
        self, params: SelectorParams, windows: list[int | None], batch: int, max_len: int,
        dtype: torch.dtype, device: torch.device, backend: Backend,
    ) -> None:  # fmt: skip
        self.backend: Backend = backend
        self.stacked: RetrievalState | None = None
        self.states: dict[int, RetrievalState] = {}
        self.rules: dict[int, RetrievalRule] = {}
        self._scratch: RetrievalScratch | None = None
        time = params.time
        layers = [] if time is None else selecting_layers(time)
        if time is None or not layers:
            return
        heads, group = params.num_kv_heads, params.group_size
        capacity = set_capacity(params, windows, max_len)
        self.stacked = RetrievalState.allocate(
            len(layers) * batch, heads, group, params.head_dim, capacity, dtype, device
        )
        for place, layer in enumerate(layers):
            self.states[layer] = _part(self.stacked, slice(place * batch, (place + 1) * batch))
            self.rules[layer] = RetrievalRule.from_time(time, layer, params.num_local, device)
        if backend == "triton":
            self._scratch = RetrievalScratch.allocate(batch, heads, group, max_len, device)

    def attend(
        self, layer: int, query: torch.Tensor, query_pre: torch.Tensor, keys: torch.Tensor,
        values: torch.Tensor, plan: StepPlan, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """Bring a layer's sets up to date and attend to them; shapes as in `retrieve` and `sparse_decode`."""
        spans, state = plan.spans[layer], self.states.get(layer)
        if state is None:
            return dense_decode(query, keys, values, scale=scale, spans=spans, backend=self.backend)[0]
        retrieve(
            query,
            keys,
            spans=spans,
            budget=plan.budget[layer],
            rule=self.rules[layer],
            state=state,
            scale=scale,
            query_pre=query_pre,
            scratch=self._scratch,
            backend=self.backend,
        )
        output, _ = sparse_decode(
            query, keys, values, state.indices,
            scale=scale, count=state.count, spans=spans, backend=self.backend,
        )  # fmt: skip
        return output

    def reset(self) -> None:
        """Forget every set."""
        if self.stacked is not None:
            self.stacked.reset()

    def changing(self) -> list[torch.Tensor]:
        """What a step writes."""
        if self.stacked is None:
            return []
        return [getattr(self.stacked, field.name) for field in dataclasses.fields(self.stacked)]


def _part(stacked: RetrievalState, rows: slice) -> RetrievalState:
    """The state of one layer as views."""
    fields = dataclasses.fields(stacked)
    return RetrievalState(**{field.name: getattr(stacked, field.name)[rows] for field in fields})

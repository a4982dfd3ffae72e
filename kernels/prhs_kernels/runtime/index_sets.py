"""The index sets of all layers of a decode run, and attention over them."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind
from prhs_kernels.ops.retrieve.state import (
    GateInputs,
    RetrievalRule,
    RetrievalScratch,
    RetrievalState,
    capacity_for,
)
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.params import Gate, SelectorParams, TimeParams
from prhs_kernels.runtime.run_audit import AuditCoin, RunAudit


def selecting_layers(time: TimeParams) -> list[int]:
    """Layers in which some head does not simply keep everything."""
    return [layer for layer, ratio in enumerate(time.budget_ratio) if bool((ratio < 1).any())]


def set_sizes(
    params: SelectorParams, layer: int, window: int | None, max_len: int, grown: bool = True
) -> list[int]:
    """Indices per head that no set of a layer can exceed in a cache of `max_len` slots; grown: nor the steps
    after a retrieval, each of which adds one."""
    time = params.time
    assert time is not None
    seen, sizes = min(max_len, window or max_len), []
    for head in range(params.num_kv_heads):
        ratio = float(time.budget_ratio[layer, head])
        budget = seen if ratio >= 1 else int(ratio * seen) + int(time.budget_tokens[layer, head])
        shares = int(time.gate[layer, head]) != Gate.NEVER
        block = min(int(time.block[layer, head]), max_len) if shares and grown else 1
        dilation = int(time.dilation[layer, head])
        sizes.append(capacity_for(budget, params.num_sinks, params.num_local, dilation, block))
    return [min(size, -(-max_len // 16) * 16) for size in sizes]


def set_capacity(params: SelectorParams, windows: list[int | None], max_len: int) -> int:
    """The largest of them over all layers and heads."""
    assert params.time is not None
    sizes = [set_sizes(params, layer, windows[layer], max_len) for layer in selecting_layers(params.time)]
    return max(16, *(size for layer in sizes for size in layer)) if sizes else 16


class IndexSets:
    """Sets of the layers that choose any; the other layers attend to everything in their spans.

    stacked: one state for all of them, its leading axis is layer and sequence, so that a step is counted at
    once; states: views of it by layer. rules: their CIS parameters by layer. copies: low-bit keys by layer,
    where retrievals scan such. audit: coins and what was found. None and empty without any.
    """

    def __init__(
        self, params: SelectorParams, windows: list[int | None], batch: int, max_len: int,
        dtype: torch.dtype, device: torch.device, backend: Backend, coin: AuditCoin | None = None,
    ) -> None:  # fmt: skip
        self.backend: Backend = backend
        self.copies: dict[int, KeyCopy] = {}
        self._params, self._device, self._batch = params, device, batch
        self.stacked: RetrievalState | None = None
        self.states: dict[int, RetrievalState] = {}
        self.rules: dict[int, RetrievalRule] = {}
        self._mean_kept: dict[int, int] = {}
        self._scratch: RetrievalScratch | None = None
        time = params.time
        layers = [] if time is None else selecting_layers(time)
        self.audit = None if coin is None else RunAudit(params, layers, batch, coin, backend)
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
            self._mean_kept[layer] = (
                sum(set_sizes(params, layer, windows[layer], max_len, grown=False)) // heads
            )
        if backend == "triton":
            self._scratch = RetrievalScratch.allocate(batch, heads, group, max_len, device)

    def copy_keys(self, keys: list[torch.Tensor], used: list[int]) -> None:
        """Low-bit copies of the caches of all layers that choose, of their first `used` slots."""
        kind, params = self._params.key_copy, self._params
        if kind == KeyCopyKind.EXACT:
            return
        for layer in self.states:
            room = keys[layer].shape[2]
            held = self.copies.get(layer)
            if held is None or held.scale.shape[2] != room:
                self.copies[layer] = KeyCopy.allocate(
                    kind, self._batch, params.num_kv_heads, room, params.head_dim, self._device
                )
            self.copies[layer].write(keys[layer][:, :, : used[layer]], backend=self.backend)

    def gate(self, layer: int, plan: StepPlan) -> GateInputs | None:
        """What the kernels decide by while they rotate; None where a layer has no sets, or by reference."""
        state = self.states.get(layer)
        if state is None or self._scratch is None:
            return None
        return GateInputs(
            plan.spans[layer],
            plan.budget[layer],
            self.rules[layer],
            state,
            self._scratch,
            self.copies.get(layer),
            self._scans(layer),
        )

    def _scans(self, layer: int) -> LayerAudit | None:
        """The coins of a layer in which a retrieval's scan serves an audit."""
        return None if self.audit is None else self.audit.scans.get(layer)

    def attend(
        self, layer: int, query: torch.Tensor, query_pre: torch.Tensor, key: torch.Tensor,
        keys: torch.Tensor, values: torch.Tensor, plan: StepPlan, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Bring a layer's sets up to date and attend to them; shapes as in `retrieve` and `sparse_decode`.

        With the kernels, `rope_append` must have run with this layer's `gate`. key: `[batch, num_kv_heads, 1,
        head_dim]`, the one that was appended to `keys`. Gives the output and the log-sum-exp `[batch,
        num_qo_heads, 1]` of what was attended to.
        """
        spans, state = plan.spans[layer], self.states.get(layer)
        if state is None:
            return dense_decode(query, keys, values, scale=scale, spans=spans, backend=self.backend)
        copy = self.copies.get(layer)
        gated = self._scratch is not None  # by `rope_append`, which has written the key's copy as well
        if copy is not None and not gated:
            copy.write(key, plan.slots[layer], backend=self.backend)
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
            key_copy=copy,
            audit=self._scans(layer),
            gated=gated,
            backend=self.backend,
        )
        return sparse_decode(
            query, keys, values, state.indices,
            scale=scale, count=state.count, spans=spans, mean_kept=self._mean_kept[layer],
            decision=state.decision, backend=self.backend,
        )  # fmt: skip

    def reset(self) -> None:
        """Forget every set and what was audited."""
        if self.stacked is not None:
            self.stacked.reset()
        if self.audit is not None:
            self.audit.reset()

    @property
    def copy_bytes(self) -> int:
        """Bytes of the key copies."""
        return sum(copy.data.nbytes + copy.scale.nbytes for copy in self.copies.values())

    def changing(self) -> list[torch.Tensor]:
        """What a step writes, but key copies: like the cache, their new slots are written before read."""
        found: list[torch.Tensor] = []
        if self.stacked is not None:
            found += [getattr(self.stacked, field.name) for field in dataclasses.fields(self.stacked)]
        return found if self.audit is None else [*found, *self.audit.changing()]


def _part(stacked: RetrievalState, rows: slice) -> RetrievalState:
    """The state of one layer as views."""
    fields = dataclasses.fields(stacked)
    return RetrievalState(**{field.name: getattr(stacked, field.name)[rows] for field in fields})

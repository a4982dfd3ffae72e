"""Dense decode of whole models: the engine with another attention, and transformers under a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, StaticCache

from prhs_kernels.ops.step_plan.api import StepPlan
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.batch_step import BatchStep
from prhs_kernels.runtime.engine import DecodeEngine

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, StepPlan], torch.Tensor]


class OtherAttention(DecodeEngine):
    """The engine's dense step with `attend(query, keys, values, scale, plan)` in the place of our kernel."""

    def __init__(
        self, model: PreTrainedModel, params: SelectorParams, *, attend: Attend, **settings: Any
    ) -> None:
        super().__init__(model, params, attention="dense", **settings)
        self._other = attend

    def _allocate(self) -> BatchStep:
        step = super()._allocate()
        step.attention = self._attend
        return step

    def _attend(
        self, layer: int, query: torch.Tensor, query_pre: torch.Tensor, key: torch.Tensor, plan: StepPlan
    ) -> torch.Tensor:
        scale = self._step.scale(layer)
        return self._other(query, self.cache.keys[layer], self.cache.values[layer], scale, plan)


def unmasked(backend: SDPBackend, positions: int) -> Attend:
    """Torch's attention over the first `positions` slots: a captured step cannot let them grow."""

    def attend(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, plan: StepPlan
    ) -> torch.Tensor:
        grouped = query.shape[1] != keys.shape[1]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query, keys[:, :, :positions], values[:, :, :positions], scale=scale, enable_gqa=grouped
            )

    return attend


def masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, plan: StepPlan
) -> torch.Tensor:
    """As gpt-fast: a boolean mask over the whole static cache, KV heads repeated."""
    mask = (torch.arange(keys.shape[2], device=keys.device) <= plan.slots[0][:, None])[:, None, None]
    repeats = query.shape[1] // keys.shape[1]
    if repeats > 1:
        keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


class TransformersStep:
    """One step of transformers' own modules on a StaticCache with a mask, under a CUDA graph on a GPU."""

    def __init__(self, model: PreTrainedModel, batch: int, kv_len: int, max_len: int) -> None:
        self._model: Any = model
        device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=max_len)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.full((batch, 1), kv_len, device=device)
        self.kv_len = kv_len
        slots = torch.arange(max_len, device=device)
        self.mask = (slots <= kv_len).expand(batch, 1, 1, max_len).contiguous()
        self.logits: Any = None
        self._run()  # allocates the cache
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def fill(self, keys: list[torch.Tensor] | None, values: list[torch.Tensor] | None, seed: int) -> None:
        """Keys and values of `kv_len` slots: the given ones, or random."""
        for index, layer in enumerate(self.cache.layers):
            state: Any = layer
            for held, given in ((state.keys, keys), (state.values, values)):
                if given is None:
                    held.normal_(generator=torch.Generator(held.device).manual_seed(seed))
                else:
                    held[:, :, : self.kv_len] = given[index][:, :, : self.kv_len]
        self.rewind()

    @torch.inference_mode()
    def rewind(self) -> None:
        """The next step writes slot `kv_len`: the mask stays the same, and so does the work."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(self.kv_len)

    @torch.inference_mode()
    def _run(self) -> None:
        self.logits = self._model(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def capture(self) -> None:
        """Record the step; it runs twice before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        self.rewind()

    def step(self) -> None:
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

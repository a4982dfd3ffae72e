"""The KV cache of a sparse model: transformers' layers, plus what the selectors remember between steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.auditing import Auditor
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.selectors.base import Rows, StepSelector
from prhs_kernels.selectors.cis import AnchorState
from prhs_kernels.selectors.memory import Memory, PromptRows


@dataclasses.dataclass
class FrozenPrefix:
    """Keys and values that a layer takes over instead of computing them (ETF).

    mask: `[batch, slots]` bool, frozen slots; keys, values: `[batch, num_kv_heads, slots, head_dim]`.
    first_active: the slots below it are frozen in every row of the batch and are not computed at all.
    """

    mask: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    first_active: int

    def merge(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Complete the keys and values of the computed slots to those of the whole prompt."""
        start = self.first_active
        mask = self.mask[:, None, start:, None]
        keys = torch.where(mask, self.keys[:, :, start:], keys)
        values = torch.where(mask, self.values[:, :, start:], values)
        return torch.cat([self.keys[:, :, :start], keys], 2), torch.cat(
            [self.values[:, :, :start], values], 2
        )


class SelectiveLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: all keys and values, the frozen prefix of its prefill, the anchor of its last retrieval."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor: AnchorState | None = None
        self.pending_prefix: FrozenPrefix | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pending_prefix is not None:
            key_states, value_states = self.pending_prefix.merge(key_states, value_states)
            self.pending_prefix = None
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def reset(self) -> None:
        self.anchor = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.anchor = None  # it may stand on a slot that is taken back
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UsageError(
            "beam search is not supported with sparse attention; use greedy decoding or sampling"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UsageError("a sparse cache serves one batch; repeat the prompts before the prefill")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UsageError("a sparse cache serves one batch; select the prompts before the prefill")


@dataclasses.dataclass
class Forward:
    """The forward pass under way: set by the model's pre-hook, read by every attention layer."""

    padding: torch.Tensor  # [batch] int64
    is_padded: bool  # some of it is not 0
    first_slot: int  # cache slot of the first input token
    is_prefill: bool  # tokens are prompt, not decode steps
    cos: torch.Tensor | None = None  # rotary tables of the input tokens, [batch, tokens, head_dim]
    sin: torch.Tensor | None = None


class PrhsCache(Cache):  # type: ignore[misc]
    """Pass it as `past_key_values` inside `sparse_attention`. One cache serves one batch of sequences.

    With every selector off its layers are the stock ones (a sliding-window layer drops what left the window);
    otherwise, or with `keep_all`, it keeps every position: the `audited` mode, in which all dropped mass can
    be measured.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        params: SelectorParams,
        keep_all: bool = False,
        keep_queries: bool = False,
    ) -> None:
        stock = DynamicCache(config=config).layers
        self._windows: list[int | None] = [getattr(layer, "sliding_window", None) for layer in stock]
        if params.is_dense and not keep_all:
            super().__init__(layers=stock)
        else:
            super().__init__(layers=[SelectiveLayer() for _ in range(params.num_layers)])
        self.params = params
        self.selector: StepSelector | None = None  # decides in decode steps instead of the axes of `params`
        self.memory = Memory()  # the selector's
        self.keep_queries = keep_queries  # of the prompt; some comparison selectors look at its attention
        self.backend: Backend = "auto"  # of the prefill's attention
        self.stats = DecodeStats()
        self.auditor: Auditor | None = None  # counts what decode steps drop
        self.alive: torch.Tensor | None = None  # [batch] bool, sequences that still count; None for all
        self.forward: Forward | None = None
        self.treat_as_decode = False  # scoring: a run of given tokens counts as decode steps
        self.prefill_dropped: dict[int, torch.Tensor] = {}  # layer -> [num_qo_heads], on sampled prompt rows
        # layer -> [1, num_kv_heads, frozen, head_dim], the frozen prefix as the dense model makes it
        self.unfrozen_keys: dict[int, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.forward is None:
            raise UsageError("this cache belongs to a sparse_attention block and only works inside it")
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def selective(self, layer: int) -> SelectiveLayer:
        """The layer's state; only there when a selector is on."""
        state = self.layers[layer]
        assert isinstance(state, SelectiveLayer)
        return state

    def rows(self, steps: int, kv_slots: int, sliding_window: int | None) -> Rows:
        """Where the last `steps` slots of the forward pass under way stand."""
        assert self.forward is not None
        device = self.forward.padding.device
        slots = torch.arange(kv_slots - steps, kv_slots, device=device)
        return Rows(slots, self.forward.padding, kv_slots, sliding_window)

    def note_prompt(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, sliding_window: int | None
    ) -> None:
        """Keep the queries of a prefill pass, each `[batch, heads, tokens, head_dim]`, where asked to.

        Not those of a batch, of a window or of a frozen prefix: comparison selectors take one dense prefill.
        """
        assert self.forward is not None
        dense = self.params.depth is None and self.params.layer is None
        if not (self.keep_queries and dense and query.shape[0] == 1):
            return
        queries = query[0]
        if self.forward.first_slot:
            queries = torch.cat([self.memory.prompts[layer].query, queries], dim=1)
        self.memory.prompts[layer] = PromptRows(queries, key[0], scale, sliding_window)

    def rewind(self, length: int) -> None:
        """Forget every slot from `length` on and every anchor; for a second run over the same prefill."""
        layers: list[Any] = self.layers
        for layer in layers:  # each on its own: a forward pass that failed half-way filled only some of them
            extra = layer.get_seq_length() - length
            if extra > 0:
                layer.crop(-extra)
        self.memory = Memory(self.memory.prompts)
        self.stats = DecodeStats()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the key and value tensors that are allocated, the whole storage of views included."""
        tensors = [tensor for layer in self._filled() for tensor in self.keys_and_values(layer)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values that the unmodified model would keep for the same tokens."""
        return self.dense_bytes_of(self.get_seq_length())

    def dense_bytes_of(self, length: int) -> int:
        """The same for `length` slots, of a cache that holds some.

        Padding included; a layer with a sliding window keeps one position less than the window.
        """
        total = 0
        for layer in self._filled():
            window = self._windows[layer]
            kept = length if window is None else min(length, window - 1)
            total += kept * sum(tensor[:, :, :1].nbytes for tensor in self.keys_and_values(layer))
        return total

    def _filled(self) -> range:
        return range(len(self.layers)) if self.is_initialized else range(0)

    def keys_and_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer holds, each `[batch, num_kv_heads, slots, head_dim]`; only after a forward pass."""
        state: Any = self.layers[layer]
        return state.keys, state.values

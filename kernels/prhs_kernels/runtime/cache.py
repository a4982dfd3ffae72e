"""The KV cache of a sparse model: transformers' layers, plus what the selectors remember between steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from prhs_kernels.errors import UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.selectors.base import Rows
from prhs_kernels.selectors.cis import AnchorState


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
    """One layer: every key and value, the frozen prefix of its prefill, and the anchor of its last retrieval."""

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

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UsageError(
            "beam search is not supported with sparse attention; use greedy decoding or sampling"
        )


@dataclasses.dataclass
class Forward:
    """The forward pass under way: set by the model's pre-hook, read by every attention layer."""

    padding: torch.Tensor  # [batch] int64
    first_slot: int  # cache slot of the first input token
    is_prefill: bool  # tokens are prompt, not decode steps
    cos: torch.Tensor | None = None  # rotary tables of the input tokens, [batch, tokens, head_dim]
    sin: torch.Tensor | None = None


class PrhsCache(Cache):  # type: ignore[misc]
    """Pass it as `past_key_values` inside `sparse_attention`. One cache serves one batch of sequences.

    With every selector off its layers are the stock ones (a sliding-window layer drops what left the window);
    otherwise, or with `keep_all`, it keeps every position: the `audited` mode, in which all dropped mass can be
    measured.
    """

    def __init__(self, config: PreTrainedConfig, params: SelectorParams, keep_all: bool = False) -> None:
        if params.is_dense and not keep_all:
            layers = DynamicCache(config=config).layers
        else:
            layers = [SelectiveLayer() for _ in range(params.num_layers)]
        super().__init__(layers=layers)
        self.params = params
        self.stats = DecodeStats()
        self.forward: Forward | None = None
        self.treat_as_decode = False  # scoring: a run of given tokens counts as decode steps
        self.unfrozen_keys: dict[
            int, torch.Tensor
        ] = {}  # layer -> [1, num_kv_heads, prompt, head_dim], for audits

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

    def rewind(self, length: int) -> None:
        """Forget every slot from `length` on and every anchor; for a second run over the same prefill."""
        extra = self.get_seq_length() - length
        for layer in self.layers:
            if extra > 0:
                layer.crop(-extra)
            if isinstance(layer, SelectiveLayer):
                layer.anchor = None
        self.stats = DecodeStats()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the key and value tensors that are allocated, the whole storage of views included."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes that stock attention of the same sequences would keep: every visible key and value, once."""
        return sum(
            layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized
        )

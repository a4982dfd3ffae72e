"""Preallocated keys and values of a decode run, filled from the cache of a prefill layer by layer."""

from __future__ import annotations

import torch

from prhs_kernels.runtime.cache import PrhsCache


class StaticCache:
    """Per layer keys and values `[batch, num_kv_heads, n, head_dim]` that never move.

    A layer with a shift holds each sequence's first `num_sinks` positions in its first slots and then
    everything from slot `shift + num_sinks` of the padded batch on: what lay between was released.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def allocate(
        self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Uninitialised buffers of one shape for every layer."""
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )

    @classmethod
    def copy_of(cls, cache: PrhsCache, max_len: int) -> StaticCache:
        """Buffers of their own for what a cache of one sequence holds."""
        found, length = cls(), cache.get_seq_length()
        for index in range(len(cache.layers)):
            pair = cache.keys_and_values(index)
            for store, filled in zip((found.keys, found.values), pair, strict=True):
                store.append(_stored(filled, length, max_len))
        return found

    def take(
        self, cache: PrhsCache, max_len: int, padding: torch.Tensor, shift: list[int], num_sinks: int
    ) -> None:
        """Move a prefilled cache here; its layers are emptied one by one, so that memory holds one twice."""
        length = cache.get_seq_length()
        self.keys, self.values = [], []
        for index, layer in enumerate(cache.layers):
            pair = cache.keys_and_values(index)
            for store, filled in zip((self.keys, self.values), pair, strict=True):
                if shift[index]:
                    store.append(_released(filled, length, max_len, padding, shift[index], num_sinks))
                else:
                    store.append(_stored(filled, length, max_len))
            del pair, filled
            empty(layer)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the storages that hold keys and values."""
        return sum(tensor.untyped_storage().nbytes() for tensor in [*self.keys, *self.values])


def empty(layer: object) -> None:
    """Free what a layer of transformers' cache holds."""
    layer.keys = layer.values = None  # type: ignore[attr-defined]
    layer.is_initialized = False  # type: ignore[attr-defined]


def _stored(filled: torch.Tensor, length: int, max_len: int) -> torch.Tensor:
    """Slots `[0, length)` of a layer, of which a sliding-window layer may only hold the last, with room for
    `max_len`."""
    batch, heads, held, head_dim = filled.shape
    room = filled.new_empty(batch, heads, max_len, head_dim)
    room[:, :, length - held : length] = filled
    return room


def _released(
    filled: torch.Tensor, length: int, max_len: int, padding: torch.Tensor, shift: int, num_sinks: int
) -> torch.Tensor:
    """The same without the slots between each sequence's sinks and `shift + num_sinks`."""
    batch, heads, held, head_dim = filled.shape
    room = filled.new_empty(batch, heads, max_len - shift, head_dim)
    begin = length - held
    window = shift + num_sinks  # first slot that stays in place
    room[:, :, num_sinks : length - shift] = filled[:, :, window - begin :]
    sinks = padding[:, None] + torch.arange(num_sinks, device=filled.device) - begin
    rows = sinks.clamp(min=0, max=held - 1)[:, None, :, None].expand(-1, heads, -1, head_dim)
    room[:, :, :num_sinks] = filled.gather(2, rows)
    return room

"""Attention of prompt tokens and of the unmodified model: no mask of tokens x slots is ever made."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prhs_kernels.ops.window_prefill.api import window_prefill
from prhs_kernels.runtime.cache import PrhsCache
from prhs_kernels.selectors.base import Rows


def dense_attention(
    cache: PrhsCache,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
    scaling: float,
    **kwargs: Any,
) -> torch.Tensor:
    """What the unmodified model computes, from what a layer of the stock cache holds."""
    assert cache.forward is not None
    steps, held = query.shape[2], key.shape[2]
    rows = cache.rows(steps, held, sliding_window)
    dropped = max(0, cache.forward.first_slot + steps - held)  # by a sliding window, padding first
    rows = dataclasses.replace(rows, padding=(rows.padding - dropped).clamp(min=0))
    if steps > 1:
        return prompt_attention(cache, module, query, key, value, rows, scaling, **kwargs)
    mask = rows.visible()[:, None] if _needs_mask(cache, held, sliding_window) else None
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]  # type: ignore[no-any-return]


def _needs_mask(cache: PrhsCache, held: int, sliding_window: int | None) -> bool:
    """Whether some row of a forward pass sees less than all slots up to its own; as transformers decides."""
    assert cache.forward is not None
    return cache.forward.is_padded or (sliding_window is not None and held >= sliding_window)


def prompt_attention(
    cache: PrhsCache,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scaling: float,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of prompt tokens; no mask of tokens x slots is made."""
    params, layer = cache.params, module.layer_idx
    assert isinstance(layer, int) and cache.forward is not None
    steps, held, window = query.shape[2], key.shape[2], rows.sliding_window
    fraction = 0.0 if params.depth is None else params.depth.window_fraction(layer, params.num_layers)
    if fraction == 0.0 and steps == held and not _needs_mask(cache, held, window):
        # causal, no more: what PyTorch's fastest kernels do
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)[0]  # type: ignore[no-any-return]
    out = window_prefill(
        query,
        key,
        value,
        scale=scaling,
        padding=rows.padding,
        window_fraction=fraction,
        num_sinks=params.num_sinks,
        num_local=params.num_local,
        sliding_window=window,
        backend=cache.backend,
    )
    return out.transpose(1, 2)

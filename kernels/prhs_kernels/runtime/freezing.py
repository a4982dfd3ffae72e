"""ETF, early token freezing: in prefill a layer skips the first tokens of the prompt (arXiv 2602.08329).

It is the same as running the layer on rows [E, T) against a cache that already holds [0, E).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prhs_kernels.params import FreezeMode
from prhs_kernels.runtime.cache import FrozenPrefix, PrhsCache

LayerForward = Callable[..., torch.Tensor]


def frozen_forward(
    cache: PrhsCache,
    layer: Any,
    forward: LayerForward,
    hidden_states: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """Stand in for a decoder layer's `forward`: hidden states `[batch, tokens, hidden]` in and out."""
    now, params = cache.forward, cache.params
    assert now is not None
    index = layer.self_attn.layer_idx
    # only the first prefill freezes: T must be known, and later turns build on finished states
    if not now.is_prefill or now.first_slot != 0:
        return forward(hidden_states, **kwargs)
    slots = hidden_states.shape[1]
    prompt = slots - now.padding
    frozen = torch.tensor([params.frozen_prefix(index, int(length)) for length in prompt.tolist()])
    ends = now.padding + frozen.to(now.padding.device)
    start = int(ends.min())
    if int(frozen.max()) == 0:
        return forward(hidden_states, **kwargs)
    mask = torch.arange(slots, device=hidden_states.device)[None, :] < ends[:, None]
    keys, values = _prefix(cache, layer, index, hidden_states, kwargs["position_embeddings"])
    cache.selective(index).pending_prefix = FrozenPrefix(mask, keys, values, start)
    kwargs = dict(kwargs, position_embeddings=tuple(t[:, start:] for t in kwargs["position_embeddings"]))
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"][:, start:]
    active = forward(hidden_states[:, start:], **kwargs)
    active = torch.where(mask[:, start:, None], hidden_states[:, start:], active)
    return torch.cat([hidden_states[:, :start], active], dim=1)


def _prefix(
    cache: PrhsCache,
    layer: Any,
    index: int,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[batch, num_kv_heads, tokens, head_dim]` that stand in for the frozen tokens'."""
    assert cache.params.layer is not None
    if cache.params.layer.mode is FreezeMode.SHARE:
        # the layer below holds, for each frozen token, what the last layer that computed it made
        return cache.keys_and_values(index - 1)
    return project(layer, hidden_states, position_embeddings)


def project(
    layer: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder layer's keys (after RoPE) and values of given hidden states, for the supported families."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape)
    if hasattr(attention, "k_norm"):  # Qwen3 normalises each head before RoPE
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    half = keys.shape[-1] // 2
    turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
    return keys * cos + turned * sin, values

"""Whole prompts through a model in one pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from prhs_kernels.ops.backend import Backend
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.cache import PrhsCache


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    params: SelectorParams,
    ids: torch.Tensor,
    mask: torch.Tensor,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, PrhsCache]:
    """Logits `[batch, vocabulary]` of the last tokens of left-padded prompts, and the cache to read from.

    ids, mask: `[batch, tokens]` int64 on the model's device; the mask is 0 on padding and 1 on tokens.

    Raises:
        UnsupportedModelError, InputError, UsageError: see `sparse_attention`.
    """
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    with sparse_attention(model, params) as cache:
        cache.backend = backend
        run: Any = model
        output = run(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
    return output.logits[:, -1], cache

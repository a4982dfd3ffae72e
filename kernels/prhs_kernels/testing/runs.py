"""Runs of a model token by token, the way a decode loop does it, with given tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.attention import Observer
from prhs_kernels.runtime.decode import left_pad
from prhs_kernels.runtime.stats import DecodeStats

# what every supported family can look like: model type and config overrides
VARIANTS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"sliding_window": 20, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", {"sliding_window": 20, "max_window_layers": 2}),
}


@torch.no_grad()
def feed(
    model: transformers.PreTrainedModel,
    cache: transformers.Cache,
    prompts: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Prefill left-padded prompts, then one decode step per column of `steps` `[batch, steps]`.

    Returns:
        logits `[batch, 1 + steps, vocabulary]`: after the prompt and after every step.
    """
    ids, mask = left_pad(prompts, pad_token_id=0)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    logits = []
    for column in [None, *torch.tensor(steps).T]:
        if column is not None:
            ids, positions = column[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def decode_steps(
    model: transformers.PreTrainedModel,
    tokens: Sequence[int],
    prefill_length: int,
    params: SelectorParams,
    observer: Observer | None = None,
) -> tuple[torch.Tensor, DecodeStats]:
    """Logits `[1 + steps, vocabulary]` and statistics of one sequence, each token its own forward pass."""
    with sparse_attention(model, params, observer) as cache:
        logits = feed(model, cache, [tokens[:prefill_length]], [tokens[prefill_length:]])
        return logits[0], cache.stats

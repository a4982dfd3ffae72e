"""Random models of a given shape, made on the device, and the check that a decode step computes the model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from prhs_kernels.bench.shapes import ModelShape
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.testing.tolerances import assert_as_exact_as

_CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
CHECK_POSITIONS, CHECK_VOCABULARY = 200, 512


def random_model(
    shape: ModelShape, max_positions: int, dtype: torch.dtype, device: str, seed: int = 0
) -> PreTrainedModel:
    """A causal language model with normal random weights, on the device from the start."""
    settings: dict[str, Any] = {} if shape.family == "llama" else {"sliding_window": None}
    config = _CONFIGS[shape.family](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_qo_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        **settings,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def check_model(shape: ModelShape, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The shape with two layers and a small vocabulary: small enough for a copy in float64."""
    small = dataclasses.replace(shape, num_layers=2, vocabulary=CHECK_VOCABULARY)
    return random_model(small, 2 * CHECK_POSITIONS, dtype, device)


@torch.inference_mode()
def check_step(engine: DecodeEngine, model: PreTrainedModel) -> None:
    """AssertionError unless the open engine's step over a random cache gives the model's logits.

    As exactly as transformers' own modules in the same precision, both judged against float64.
    """
    engine.fill_random(CHECK_POSITIONS - 1, seed=1)
    cache = [
        (keys[:, :, : CHECK_POSITIONS - 1].clone(), values[:, :, : CHECK_POSITIONS - 1].clone())
        for keys, values in zip(engine.cache.keys, engine.cache.values, strict=True)
    ]
    tokens = engine.tokens.clone()[:, None]
    engine.step()
    stock = transformers_step(model, tokens, cache)
    exact = transformers_step(
        copy.deepcopy(model).double(), tokens, [(k.double(), v.double()) for k, v in cache]
    )
    assert_as_exact_as(engine.logits, stock, exact, "logits")


def transformers_step(
    model: PreTrainedModel, tokens: torch.Tensor, cache: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Logits `[batch, vocabulary]` of one token behind a cache, through transformers' modules."""
    held = DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        held.update(keys, values, layer)
    run: Any = model
    logits: torch.Tensor = run(input_ids=tokens, past_key_values=held, use_cache=True).logits
    return logits[:, -1]

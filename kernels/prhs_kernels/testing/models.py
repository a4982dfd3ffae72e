"""Tiny random checkpoints of every supported architecture: the real modelling code, sized for unit tests."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from prhs_kernels.errors import UnsupportedModelError

VOCAB_SIZE = 128
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3

_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny_config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """Config of 4 layers, 4 query heads, 2 KV heads, head_dim 16, vocabulary 128, context 512.

    No sliding window unless asked for: `sliding_window=8` gives every layer of Mistral and of Qwen2/3 one;
    for Qwen, `max_window_layers=n` leaves the first n layers without.
    """
    if model_type not in _CONFIGS:
        raise UnsupportedModelError(
            f"no tiny model of type {model_type!r}: choose one of {', '.join(_CONFIGS)}"
        )
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        # 1 / sqrt(hidden_size): with the usual 0.02 every attention row would be uniform at this width
        "initializer_range": 0.125,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }
    if model_type == "llama":
        settings.pop("sliding_window")
    elif model_type.startswith("qwen"):
        settings["use_sliding_window"] = overrides.get("sliding_window") is not None
        settings["max_window_layers"] = 0
    config: transformers.PreTrainedConfig = _CONFIGS[model_type](**(settings | overrides))
    return config


def tiny_model(
    model_type: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any
) -> transformers.PreTrainedModel:
    """Random float32 causal language model on the CPU, in eval mode; the same seed gives the same weights.

    `overrides` go to the config (`num_hidden_layers=2`, `sliding_window=8`, ...). The caller's random state
    is left as it was.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
        # Biases and norm gains start at constants: random ones let a test notice when they are left out.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 1.0 if "norm" in name else 0.0
                parameter.data = offset + 0.1 * torch.randn_like(parameter)
    model.eval()
    return model


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges over ASCII: the id of a character is its code (from 4 on).

    Ids 0 to 3 are `<pad>`, `<s>`, `</s>`, `<unk>`; a byte outside ASCII is `<unk>`. No token is added to
    a text.
    """
    to_symbol = _byte_symbols()
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {to_symbol[byte]: byte for byte in range(len(SPECIAL_TOKENS), VOCAB_SIZE)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
    )


def tiny_checkpoint(
    folder: pathlib.Path, model_type: str, *, seed: int = 0, **overrides: Any
) -> pathlib.Path:
    """Write config, safetensors weights and tokenizer of a tiny model to `folder`, and return it."""
    tiny_model(model_type, seed=seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level tokenizers (the GPT-2 convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(256 + rank) for rank, byte in enumerate(others)}

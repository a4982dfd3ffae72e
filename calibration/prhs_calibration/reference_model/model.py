"""The model that a training run starts from, and its checkpoint."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prhs_kernels.errors import InputError

from .options import TrainingOptions
from .tokenizer import BOS_ID, EOS_ID, PAD_ID

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def new_model(options: TrainingOptions) -> "LlamaForCausalLM":
    """Llama with weights drawn at std 1/sqrt(hidden): at this width the usual 0.02 never learns to recall."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    query_heads = options.query_heads or options.hidden // 32
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=query_heads,
        num_key_value_heads=options.kv_heads or options.hidden // 64,
        head_dim=options.head_dim or options.hidden // query_heads,
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        max_position_embeddings=options.context_length,
        initializer_range=options.hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def started_model(options: TrainingOptions) -> "LlamaForCausalLM":
    """The model of `start` in fp32, only the tensors that `trainable` is found in to be trained."""
    from transformers import LlamaForCausalLM

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(str(options.start), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(options.trainable, name)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"no tensor of {options.start} matches --trainable {options.trainable!r}")
    return model


def save_weights(model: "LlamaForCausalLM", out: Path, max_shard_size: str = "1GB") -> None:
    """Write the bf16 checkpoint; the fp32 weights of the model in training stay as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    rounded = LlamaForCausalLM(config)
    rounded.to(torch.bfloat16)  # type: ignore[arg-type]
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(str(out), max_shard_size=max_shard_size)

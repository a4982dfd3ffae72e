"""What the decode engine has to know of a model before it takes it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prhs_kernels.ops.backend import HEAD_DIMS, KERNEL_DTYPES, MAX_GROUP, Backend
from prhs_kernels.ops.retrieve.state import MAX_DILATION
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.decoder_step import unsupported
from prhs_kernels.runtime.distributed import num_ranks


def engine_unsupported(
    model: PreTrainedModel, params: SelectorParams, backend: Backend = "reference"
) -> str | None:
    """Why this run needs the reference loop, in a few words, or None; backend `reference` or `triton`."""
    time, ranks = params.time, num_ranks(model)
    if ranks > 1:
        return f"the model is split over {ranks} ranks"
    if backend == "triton":
        if params.head_dim not in HEAD_DIMS:
            return f"head_dim = {params.head_dim} has no kernel"
        if params.group_size > MAX_GROUP:
            return f"{params.group_size} query heads per KV head are more than {MAX_GROUP}"
        if model.dtype not in KERNEL_DTYPES:
            return f"{model.dtype} has no kernel"
    if time is not None and not time.reanchor:
        return "reanchor = False keeps two sets per head"
    if time is not None and int(time.dilation.max()) > MAX_DILATION:
        return f"more than {MAX_DILATION} neighbours on either side"
    return unsupported(model)


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """The model's own window of every layer, in positions."""
    config: Any = model.config
    decoder: Any = model.base_model
    if config.model_type == "mistral":  # kept in the config; Qwen keeps it per layer in the module
        return [config.sliding_window] * config.num_hidden_layers
    return [getattr(layer.self_attn, "sliding_window", None) for layer in decoder.layers]

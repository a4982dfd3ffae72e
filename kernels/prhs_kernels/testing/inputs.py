"""Selector parameters, prompts and exact models for unit tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import DepthParams, Gate, LayerParams, SelectorParams, TimeParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.testing.models import SPECIAL_TOKENS, VOCAB_SIZE, tiny_model

PerHead = float | Sequence[float] | Sequence[Sequence[float]]  # broadcast to [num_layers, num_kv_heads]


def time_params(
    num_layers: int,
    num_kv_heads: int,
    *,
    budget_ratio: PerHead = 0.0,
    budget_tokens: PerHead = 0,
    gate: PerHead = Gate.POST_ROPE,
    tau_cos: PerHead = 0.8,
    block: PerHead = 8,
    dilation: PerHead = 1,
    reanchor: bool = True,
) -> TimeParams:
    """CIS parameters: a number is the same for every head, `[num_kv_heads]` the same for every layer."""

    def table(value: PerHead, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(num_layers, num_kv_heads).contiguous()

    return TimeParams(
        budget_ratio=table(budget_ratio, torch.float32),
        budget_tokens=table(budget_tokens, torch.int32),
        gate=table(gate, torch.uint8),
        tau_cos=table(tau_cos, torch.float32),
        block=table(block, torch.int32),
        dilation=table(dilation, torch.int32),
        reanchor=reanchor,
    )


def selector_params(
    config: transformers.PreTrainedConfig,
    *,
    time: dict[str, Any] | None = None,
    depth: DepthParams | None = None,
    layer: LayerParams | None = None,
    num_sinks: int = 2,
    num_local: int = 4,
    key_copy: KeyCopyKind = KeyCopyKind.EXACT,
) -> SelectorParams:
    """Parameters for a tiny model; `time` holds the arguments of `time_params`, None is off."""
    dense = dense_params(config)
    return dataclasses.replace(
        dense,
        num_sinks=num_sinks,
        num_local=num_local,
        time=None if time is None else time_params(dense.num_layers, dense.num_kv_heads, **time),
        depth=depth,
        layer=layer,
        key_copy=key_copy,
    )


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids without special tokens, every one of the tiny vocabulary equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (count,), generator=generator).tolist()


def exact_model(model_type: str, **settings: Any) -> transformers.PreTrainedModel:
    """`tiny_model` in float64 throughout; as it comes, its norms would round to float32 in between.

    The rotary tables stay what float32 makes them: they are inputs of both sides of every comparison.
    """
    model = tiny_model(model_type, **settings).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    return model


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    variance = hidden_states.square().mean(dim=-1, keepdim=True)
    return module.weight * hidden_states * torch.rsqrt(variance + module.variance_epsilon)

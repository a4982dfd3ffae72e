"""Make a transformers model sparse for the length of a `with` block, and put everything back afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from prhs_kernels.errors import InputError, UnsupportedModelError, UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attention import Observer, attention_forward
from prhs_kernels.runtime.cache import Forward, PrhsCache
from prhs_kernels.runtime.distributed import local_params
from prhs_kernels.runtime.freezing import frozen_forward
from prhs_kernels.selectors.base import StepSelector

IMPLEMENTATION = "prhs"
MLP_TOKENS = 2**14  # that go through an MLP together: enough rows for a matrix product at full speed
SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse by name every model whose attention the selectors were not derived for.

    Raises:
        UnsupportedModelError: with the model type or the setting that is in the way.
    """
    if config.model_type not in SUPPORTED_MODELS:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported; supported are {', '.join(SUPPORTED_MODELS)}"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap:
        raise UnsupportedModelError(f"attention logit softcapping ({softcap}) is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise UnsupportedModelError(f"partial rotary embedding (factor {partial}) is not supported")


def dense_params(config: PreTrainedConfig) -> SelectorParams:
    """Parameters of this model with every selector off."""
    heads = config.num_attention_heads
    return SelectorParams(
        num_layers=config.num_hidden_layers,
        num_qo_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def check_params(config: PreTrainedConfig, params: SelectorParams) -> None:
    """Refuse parameters of another shape of model, naming the first field that differs."""
    own = dense_params(config)
    for field in ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim"):
        if getattr(own, field) != getattr(params, field):
            raise InputError(
                f"these selector parameters are for {field} = {getattr(params, field)}, "
                f"the model has {getattr(own, field)}; calibrate this model"
            )


def check_selector(params: SelectorParams, selector: StepSelector | None) -> None:
    """Refuse a comparison selector beside axes of our own: its figures would be those of a mixture."""
    if selector is not None and not params.is_dense:
        raise UsageError("a comparison selector takes the place of every axis; give parameters with all off")


@contextlib.contextmanager
def sparse_attention(
    model: PreTrainedModel,
    params: SelectorParams,
    observer: Observer | None = None,
    selector: StepSelector | None = None,
    keep_queries: bool = False,
) -> Iterator[PrhsCache]:
    """Run `model` with the selectors of `params`; give the cache to pass as `past_key_values`.

    With a `selector`, that method chooses what a decode step attends to, and `params` have every axis off;
    it finds the prompt's queries in the cache, as does one that is set later when `keep_queries` is given.
    Everything that is patched is restored when the block ends, also after an exception. `params` are those of
    the whole model, also where transformers has split it over ranks; the cache holds this rank's heads.

    Raises:
        UnsupportedModelError: the model's attention is not one we have derived the selectors for.
        InputError: `params` belong to a model of another shape.
        UsageError: the model is inside another `sparse_attention` block, or is fed without our cache; a
            selector beside an axis.
    """
    check_supported(model.config)
    check_params(model.config, params)
    check_selector(params, selector)
    params = local_params(model, params)
    if model.config._attn_implementation == IMPLEMENTATION:
        raise UsageError("this model is already inside a sparse_attention block")
    cache = PrhsCache(
        model.config,
        params,
        keep_all=observer is not None or selector is not None or keep_queries,
        keep_queries=keep_queries or selector is not None,
    )
    cache.selector = selector
    decoder: Any = model.base_model
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, cache, "forward", None)  # the cache is of no use to the unpatched model
        _register(undo)
        _patch(undo, model.config, "_attn_implementation", IMPLEMENTATION)
        for layer in decoder.layers:
            attend = functools.partial(attention_forward, cache, observer)
            _patch(undo, layer.self_attn, "_prhs_forward", attend)
            _patch(undo, layer.mlp, "forward", functools.partial(mlp_in_parts, layer.mlp.forward))
            if params.layer is not None:
                _patch(undo, layer, "forward", functools.partial(frozen_forward, cache, layer, layer.forward))
        for module, hook in ((decoder, _begin), (decoder.layers[0], _keep_rope)):
            handle = module.register_forward_pre_hook(OwnHook(hook, cache), with_kwargs=True)
            undo.callback(handle.remove)
        yield cache


def _patch(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute; afterwards the owner has what it had: its own, its class's, or none."""
    if name in vars(owner) or isinstance(getattr(type(owner), name, None), property):
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def mlp_in_parts(forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """An MLP over many tokens a part at a time: its three wide tensors would be the peak of a prefill."""
    batch, tokens, width = hidden.shape
    if batch * tokens <= MLP_TOKENS:
        return forward(hidden)
    rows, out = hidden.reshape(1, -1, width), torch.empty_like(hidden)
    for part, into in zip(rows.split(MLP_TOKENS, 1), out.view(rows.shape).split(MLP_TOKENS, 1), strict=True):
        into.copy_(forward(part))
    return out


class OwnHook(functools.partial[object]):
    """A hook of a `sparse_attention` block. The decode engine does by itself what it is there for."""


_open_blocks: list[contextlib.ExitStack] = []  # blocks of several models may end in any order


def _register(undo: contextlib.ExitStack) -> None:
    """Make the name known to transformers until the last open block has ended.

    Not to its `AttentionMaskInterface`: without an entry there no model makes a mask of tokens x slots.
    """
    AttentionInterface.register(IMPLEMENTATION, _dispatch)
    _open_blocks.append(undo)
    undo.callback(_unregister, undo)


def _unregister(undo: contextlib.ExitStack) -> None:
    _open_blocks.remove(undo)
    if not _open_blocks:
        AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    forward = getattr(module, "_prhs_forward", None)
    if forward is None or scaling is None:
        raise UsageError("attention implementation 'prhs' only works inside a sparse_attention block")
    return forward(module, query, key, value, scaling, sliding_window, **kwargs)  # type: ignore[no-any-return]


def _begin(cache: PrhsCache, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Decoder pre-hook: which tokens are these, and how much padding stands before them?"""
    if kwargs.get("past_key_values") is not cache:
        raise UsageError(
            "inside sparse_attention the model must get past_key_values=<the cache of the block>"
        )
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    batch, steps = tokens.shape[:2]
    past = cache.get_seq_length()
    is_prefill = past == 0 or (steps > 1 and not cache.treat_as_decode)
    padding = _padding(kwargs.get("attention_mask"), batch, past + steps)
    cache.forward = Forward(
        padding=padding.to(tokens.device),
        is_padded=bool(padding.any()),
        first_slot=past,
        is_prefill=is_prefill,
    )


def _padding(mask: Any, batch: int, slots: int) -> torch.Tensor:
    """Padding slots at the left of each row, `[batch]` int64, of an attention mask over all slots so far."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long)
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if shape != (batch, slots):
        raise UsageError(f"attention_mask must be {(batch, slots)}, past tokens included; got {shape}")
    if bool((mask.long().diff(dim=-1) < 0).any()):
        raise UsageError("batches must be padded on the left")
    return (mask == 0).sum(dim=-1)


def _keep_rope(
    cache: PrhsCache, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """First layer's pre-hook: keep the rotary tables, to compare queries before RoPE."""
    assert cache.forward is not None
    cache.forward.cos, cache.forward.sin = kwargs["position_embeddings"]

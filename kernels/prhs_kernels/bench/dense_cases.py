"""Dense decode attention as a rival: our split-K kernel, torch's, and other packages if installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prhs_kernels.bench.cases import Case, Inputs, Kind
from prhs_kernels.bench.timing import Calls
from prhs_kernels.ops.dense_decode.api import dense_decode

Call = Callable[[int], torch.Tensor]
AS_GPT_FAST = "masked sdpa as gpt-fast"


def dense_cases(inputs: Inputs) -> Iterator[Case]:
    """The likely fastest first; then the masked ones that a static cache leads to."""
    makers: dict[str, Callable[[Inputs], Call]] = {"dense_decode": _ours, **_sdpa(inputs)}
    yield from (_case(inputs, name, "dense", make) for name, make in makers.items())
    grouped = inputs.problem.group > 1
    if grouped:
        yield _case(inputs, "masked sdpa", "masked", functools.partial(_masked, False))
    yield _case(inputs, AS_GPT_FAST, "masked", functools.partial(_masked, grouped))


def slow_to_start_cases(inputs: Inputs) -> Iterator[Case]:
    """Rivals that compile for many seconds or that are other packages."""
    if inputs.device != "cpu":
        yield _case(inputs, "FlexAttention, compiled", "dense", _flex)
        if importlib.util.find_spec("flash_attn") is not None:
            yield _case(inputs, "flash-attn", "dense", _flash_attn)
        if importlib.util.find_spec("flashinfer") is not None:
            yield _case(inputs, "FlashInfer", "dense", _flashinfer)


def dense_bytes(inputs: Inputs) -> int:
    """The byte floor: K and V once."""
    p = inputs.problem
    return 2 * p.rows * p.n * p.head_dim * inputs.item


def _case(inputs: Inputs, name: str, kind: Kind, make: Callable[[Inputs], Call]) -> Case:
    def prepare() -> Calls:
        call = make(inputs)
        inputs.check(call(0), inputs.dense_outputs)
        return inputs.rotate(call)

    return Case(name, kind, dense_bytes(inputs), prepare)


def _ours(inputs: Inputs) -> Call:
    return lambda i: dense_decode(*inputs.kv(i), scale=inputs.scale, backend="triton")[0]


def _sdpa(inputs: Inputs) -> dict[str, Callable[[Inputs], Call]]:
    """Torch's attention by backend, unmasked; `folded` has the query group as query rows."""
    from torch.nn.attention import SDPBackend

    grouped = inputs.problem.group > 1
    if inputs.device == "cpu":
        return {"sdpa math": functools.partial(_plain, SDPBackend.MATH)}
    makers: dict[str, Callable[[Inputs], Call]] = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        if name != "efficient" or not grouped:  # that one knows no groups
            makers[f"sdpa {name}"] = functools.partial(_plain, backend)
        if grouped:
            makers[f"sdpa {name}, group folded"] = functools.partial(_folded, backend)
    return makers


def _plain(backend: Any, inputs: Inputs) -> Call:
    return lambda i: _attention(backend, *inputs.kv(i), inputs.scale)


def _folded(backend: Any, inputs: Inputs) -> Call:
    p = inputs.problem

    def call(i: int) -> torch.Tensor:
        query, keys, values = inputs.kv(i)
        query = query.view(p.batch, p.num_kv_heads, p.group, p.head_dim)
        return _attention(backend, query, keys, values, inputs.scale)

    return call


def _attention(
    backend: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )


def _masked(repeat: bool, inputs: Inputs) -> Call:
    """With the mask of a static cache; gpt-fast repeats the KV heads as well."""
    p = inputs.problem
    mask = torch.ones(1, 1, 1, p.n, dtype=torch.bool, device=inputs.device)

    def call(i: int) -> torch.Tensor:
        query, keys, values = inputs.kv(i)
        if repeat:
            keys, values = (tensor.repeat_interleave(p.group, dim=1) for tensor in (keys, values))
        grouped = keys.shape[1] != query.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=inputs.scale, enable_gqa=grouped
        )

    return call


def _flex(inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # otherwise a second problem is compiled for changing sizes, which is slower
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = inputs.problem.group > 1
    return lambda i: compiled(*inputs.kv(i), scale=inputs.scale, enable_gqa=grouped)


def _flash_attn(inputs: Inputs) -> Call:
    from flash_attn import flash_attn_with_kvcache

    def call(i: int) -> torch.Tensor:
        query, keys, values = (tensor.transpose(1, 2) for tensor in inputs.kv(i))
        output: torch.Tensor = flash_attn_with_kvcache(query, keys, values, softmax_scale=inputs.scale)
        return output.transpose(1, 2)

    return call


def _flashinfer(inputs: Inputs) -> Call:
    """Every sequence is one page, so that the cache is read where it lies."""
    import flashinfer

    p, device = inputs.problem, inputs.device
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device=device), "HND", use_tensor_cores=p.group > 1
    )
    pages = torch.arange(p.batch + 1, dtype=torch.int32, device=device)
    last = torch.full((p.batch,), p.n, dtype=torch.int32, device=device)
    heads = p.num_qo_heads, p.num_kv_heads, p.head_dim
    wrapper.plan(pages, pages[:-1], last, *heads, p.n, q_data_type=inputs.dtype, sm_scale=inputs.scale)

    def call(i: int) -> torch.Tensor:
        query, keys, values = inputs.kv(i)
        output: torch.Tensor = wrapper.run(query[:, :, 0], (keys, values))
        return output

    return call

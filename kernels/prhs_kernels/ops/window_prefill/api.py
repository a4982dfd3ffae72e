"""Causal attention of a run of prompt tokens inside a window with sinks (PSAW, arXiv 2602.08329)."""

from __future__ import annotations

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import (
    Backend,
    check_attention,
    check_kernel_limits,
    check_like,
    check_shape,
    use_triton,
)
from prhs_kernels.ops.window_prefill import reference

INTEGERS = (torch.int64, torch.int32)


def window_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    padding: torch.Tensor | None = None,
    window_fraction: float = 0.0,
    num_sinks: int = 0,
    num_local: int = 1,
    sliding_window: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention of the last `steps` of n cache slots, each over what precedes it and its window leaves.

    A query at position t (slot minus left padding) sees the positions i <= t with i < num_sinks, or
    i >= floor(window_fraction * t), or i > t - num_local; of these a model with a sliding window sees those
    with i > t - sliding_window. Whole prompts have steps = n; a chunk of a prompt, or the rows that early
    token freezing leaves, stand behind n - steps slots that are already in the cache.

    Args:
        query: `[batch, num_qo_heads, steps, head_dim]`, float32, float16 or bfloat16.
        keys, values: `[batch, num_kv_heads, n, head_dim]`, the query's dtype, n >= steps. A slot that no
            query of the call sees may hold anything, NaN included.
        scale: factor on the dot products, positive.
        padding: `[batch]` int64 or int32, slots before the first real token; None for none.
        window_fraction: fraction of the oldest positions that is not seen, in [0, 1);
            `DepthParams.window_fraction` of the layer. The product is taken in float64.
        num_sinks, num_local: positions at the start and most recent ones that the window never cuts.
        sliding_window: the model's own window in positions, the current one included.
        backend: `auto` is triton on CUDA for what the kernel takes, the reference elsewhere.

    Returns:
        `[batch, num_qo_heads, steps, head_dim]` in the query's dtype; 0 for a row that sees nothing
        (padding).

    Raises:
        UsageError: shapes, dtypes, devices or numbers that cannot be meant, or that the backend cannot take.
        ResourceError: `backend="triton"` where triton cannot run.
    """
    check_attention(query, keys, values, scale, steps=None)
    _check_numbers(window_fraction, num_sinks, num_local, sliding_window)
    if query.shape[2] > keys.shape[2]:
        raise UsageError(f"query: {query.shape[2]} rows, but only {keys.shape[2]} slots of keys and values")
    if padding is None:
        padding = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
    check_shape("padding", padding, (query.shape[0],))
    check_like("padding", padding, query, INTEGERS)
    run = reference.window_prefill
    if _runs_kernel(backend, query, keys, values):
        from prhs_kernels.ops.window_prefill import triton as kernel

        run = kernel.window_prefill
        query = query if query.stride(-1) == 1 else query.contiguous()
    return run(
        query,
        keys,
        values,
        padding,
        scale=scale,
        window_fraction=window_fraction,
        num_sinks=num_sinks,
        num_local=num_local,
        sliding_window=sliding_window,
    )


def _runs_kernel(backend: Backend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    if not use_triton(backend, query):
        return False
    try:
        check_kernel_limits(query, keys, values)
    except UsageError:
        if backend == "triton":
            raise
        return False
    return True


def _check_numbers(
    window_fraction: float, num_sinks: int, num_local: int, sliding_window: int | None
) -> None:
    checks = {
        f"window_fraction = {window_fraction} must be in [0, 1)": 0 <= window_fraction < 1,
        f"num_sinks = {num_sinks} must be >= 0": num_sinks >= 0,
        f"num_local = {num_local} must be >= 1": num_local >= 1,
        f"sliding_window = {sliding_window} must be >= 1": sliding_window is None or sliding_window >= 1,
    }
    for message, valid in checks.items():
        if not valid:
            raise UsageError(message)

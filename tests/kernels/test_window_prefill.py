"""Prefill attention in plain PyTorch against one softmax per row, and its mask against the selectors'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prhs_kernels.bench.prefill_cases import visible_pairs
from prhs_kernels.errors import ResourceError, UsageError
from prhs_kernels.ops.window_prefill import api, reference
from prhs_kernels.ops.window_prefill.api import window_prefill
from prhs_kernels.params import DepthParams, SelectorParams
from prhs_kernels.runtime import prompt_attention
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.testing.inputs import random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model


def seen_by(position: int, fraction: float, num_sinks: int, num_local: int, sliding: int | None) -> list[int]:
    start = int(fraction * position)  # Python's floats are float64
    return [
        i
        for i in range(position + 1)
        if (i < num_sinks or i >= start or i > position - num_local)
        and (sliding is None or i > position - sliding)
    ]


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: list[int],
    scale: float,
    *window: Any,
) -> torch.Tensor:
    output = torch.zeros_like(query)
    group, behind = query.shape[1] // keys.shape[1], keys.shape[2] - query.shape[2]
    for batch, head, row in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        pad = padding[batch]
        seen = [pad + i for i in seen_by(behind + row - pad, *window)]
        if seen:
            logits = keys[batch, head // group, seen] @ query[batch, head, row] * scale
            output[batch, head, row] = logits.softmax(-1) @ values[batch, head // group, seen]
    return output


@pytest.mark.parametrize(("steps", "n"), [(1, 1), (15, 15), (17, 17), (33, 33), (5, 63), (64, 111)])
@pytest.mark.parametrize(
    "window", [(0.0, 0, 1, None), (0.6, 2, 3, None), (0.9, 0, 1, 20), (0.0, 0, 1, 7), (0.29, 70, 90, None)]
)
def test_against_brute_force(
    monkeypatch: pytest.MonkeyPatch, steps: int, n: int, window: tuple[float, int, int, int | None]
) -> None:
    monkeypatch.setattr(reference, "QUERY_CHUNK", 16)  # several chunks, the last one ragged
    generator = torch.Generator().manual_seed(n)
    draw = [
        torch.randn(2, heads, rows, 8, generator=generator, dtype=torch.float64)
        for heads, rows in ((4, steps), (2, n), (2, n))
    ]
    padding = [0, n // 2]
    fraction, num_sinks, num_local, sliding = window
    output = window_prefill(
        *draw,
        scale=0.3,
        padding=torch.tensor(padding),
        window_fraction=fraction,
        num_sinks=num_sinks,
        num_local=num_local,
        sliding_window=sliding,
    )
    torch.testing.assert_close(output, naive(*draw, padding, 0.3, *window), rtol=1e-12, atol=1e-12)
    if steps == n and n > 1:
        assert not output[1, :, 0].any(), "a row that sees nothing is zero"


@pytest.mark.parametrize("depth", [DepthParams(0, 0.5), DepthParams(2, 0.05), DepthParams(1, 0.9, 3.0)])
@pytest.mark.parametrize("sliding", [None, 40])
def test_the_mask_is_what_the_selectors_call_candidates(depth: DepthParams, sliding: int | None) -> None:
    """At positions up to a million, where a product in float32 would be off by several positions."""
    params = SelectorParams(6, 4, 2, 8, num_sinks=3, num_local=5, depth=depth)
    padding = torch.tensor([0, 11])
    for n, steps in ((150, 150), (1_000_003, 3)):
        slots = torch.arange(n - steps, n)
        for layer in range(params.num_layers):
            wanted = candidates(Rows(slots, padding, n, sliding), params, layer)
            fraction = depth.window_fraction(layer, params.num_layers)
            assert torch.equal(reference.visible(slots, padding, n, fraction, 3, 5, sliding), wanted)


@pytest.mark.parametrize("window", [(0.0, 0, 1), (0.25, 4, 32), (0.9, 0, 1), (0.5, 50, 3)])
@pytest.mark.parametrize("tokens", [1, 5, 333])
def test_benchmarks_count_the_pairs_of_the_mask(tokens: int, window: tuple[float, int, int]) -> None:
    mask = reference.visible(torch.arange(tokens), torch.zeros(1).long(), tokens, *window, None)
    assert visible_pairs(tokens, *window) == int(mask.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale = 0.0 must be positive"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"window_fraction": 1.0}, r"window_fraction = 1.0 must be in \[0, 1\)"),
        ({"window_fraction": -0.1}, "window_fraction = -0.1"),
        ({"num_sinks": -1}, "num_sinks = -1 must be >= 0"),
        ({"num_local": 0}, "num_local = 0 must be >= 1"),
        ({"sliding_window": 0}, "sliding_window = 0 must be >= 1"),
        ({"padding": torch.zeros(3, dtype=torch.int64)}, r"padding: expected shape \[2\], got \[3\]"),
        (
            {"padding": torch.zeros(2)},
            "padding: expected dtype torch.int64 or torch.int32, got torch.float32",
        ),
        ({"backend": "fast"}, "backend = 'fast'"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    tensors = [torch.ones(2, heads, 5, 32) for heads in (4, 2, 2)]
    with pytest.raises(UsageError, match=message):
        window_prefill(*tensors, **{"scale": 1.0, **change})


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, keys = torch.ones(2, 4, 5, 32), torch.ones(2, 2, 5, 32)
    with pytest.raises(UsageError, match="query: 5 rows, but only 4 slots"):
        window_prefill(query, keys[:, :, :4], keys[:, :, :4], scale=1.0)
    with pytest.raises(UsageError, match="not a multiple"):
        window_prefill(query[:, :3], keys, keys, scale=1.0)
    with pytest.raises(UsageError, match=r"values: expected shape \[2, 2, 5, 32\]"):
        window_prefill(query, keys, keys[:, :, :4], scale=1.0)
    with pytest.raises(ResourceError, match="backend 'triton' needs"):
        window_prefill(query, keys, keys, scale=1.0, backend="triton")


def test_auto_takes_the_reference_where_the_kernel_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "use_triton", lambda backend, tensor: True)
    query, keys = torch.ones(2, 4, 5, 48), torch.ones(2, 2, 5, 48)
    assert torch.equal(window_prefill(query, keys, keys, scale=1.0), query)
    with pytest.raises(UsageError, match="head_dim = 48"):
        window_prefill(query, keys, keys, scale=1.0, backend="triton")


def test_no_rows_give_no_rows() -> None:
    query, keys = torch.ones(2, 4, 0, 32), torch.ones(2, 2, 5, 32)
    assert window_prefill(query, keys, keys, scale=1.0).shape == (2, 4, 0, 32)


def test_the_backend_of_a_run_is_that_of_its_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*tensors: torch.Tensor, **numbers: Any) -> torch.Tensor:
        asked.append(numbers["backend"])
        return window_prefill(*tensors, **numbers)

    monkeypatch.setattr(prompt_attention, "window_prefill", spy)
    model = tiny_model("llama")
    params = selector_params(model.config, depth=DepthParams(0, 0.5))
    ids = torch.tensor([random_tokens(20)])
    with sparse_attention(model, params) as cache:
        model(input_ids=ids, past_key_values=cache)
    assert set(asked) == {"auto"} and len(asked) == params.num_layers - 1, "the first layer has no window"
    asked.clear()
    with DecodeEngine(model, params, batch_size=1, max_len=30, backend="reference") as engine:
        engine.prefill(ids, torch.ones_like(ids))
    assert set(asked) == {"reference"}

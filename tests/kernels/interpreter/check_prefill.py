"""The prefill kernel against the reference: in the interpreter without a GPU, compiled with one."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from prhs_kernels.bench import prefill_cases
from prhs_kernels.errors import UsageError
from prhs_kernels.ops.window_prefill import reference
from prhs_kernels.ops.window_prefill.api import window_prefill
from prhs_kernels.testing.far_rows import far_rows
from prhs_kernels.testing.tolerances import assert_as_exact_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 is silently wrong in the interpreter
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SIZES = [(1, 1), (15, 15), (17, 17), (63, 63), (111, 111), (300, 300), (1, 111), (17, 63), (100, 300)]
HEADS = [(1, 1), (3, 1), (2, 2), (4, 2)]  # query, KV
HEAD_DIM = [32, 64, 80, 96, 128, 256]
WINDOWS: list[dict[str, Any]] = [
    {},
    {"window_fraction": 0.5, "num_sinks": 4, "num_local": 8},
    {"window_fraction": 0.9, "num_sinks": 0, "num_local": 1},
    {"window_fraction": 0.3, "num_sinks": 70, "num_local": 40},
    {"window_fraction": 0.75, "num_sinks": 2, "num_local": 3, "sliding_window": 50},
    {"sliding_window": 13},
    {"sliding_window": 1},
    {"window_fraction": 0.999, "num_sinks": 1000, "num_local": 1000},
]


def spread(*axes: list[Any]) -> list[tuple[Any, ...]]:
    """Every value of every axis at least four times, partners drawn: the whole product takes too long."""
    count = 4 * max(len(axis) for axis in axes)
    shuffle = random.Random(0).sample
    columns = [shuffle((axis * count)[:count], count) for axis in axes]
    return list(zip(*columns, strict=True))


CASES = spread(SIZES, HEADS, HEAD_DIM, DTYPES, WINDOWS)


def inputs(
    sizes: tuple[int, int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, batch: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes) + head_dim)

    def draw(count: int, rows: int) -> torch.Tensor:
        drawn = 2 * torch.randn(batch, count, rows, head_dim, generator=generator)
        return drawn.to(device=DEVICE, dtype=dtype)

    return draw(heads[0], sizes[0]), draw(heads[1], sizes[1]), draw(heads[1], sizes[1])


def hidden_slots(steps: int, n: int, padding: torch.Tensor, window: dict[str, Any]) -> torch.Tensor:
    """Slots that no query of the call sees: `[batch, n]` bool."""
    numbers = (window.get("window_fraction", 0.0), window.get("num_sinks", 0), window.get("num_local", 1))
    slots = torch.arange(n - steps, n, device=DEVICE)
    return ~reference.visible(slots, padding, n, *numbers, window.get("sliding_window")).any(dim=1)


def check(tensors: tuple[torch.Tensor, ...], padding: torch.Tensor, window: dict[str, Any]) -> torch.Tensor:
    """The kernel on poisoned keys and values against the reference on clean ones; the kernel's result."""
    query, keys, values = tensors
    given = {"scale": 0.11, "padding": padding, **window}
    stock = window_prefill(*tensors, **given, backend="reference")
    exact = window_prefill(*(t.double() for t in tensors), **given, backend="reference")
    hidden = hidden_slots(query.shape[2], keys.shape[2], padding, window)[:, None, :, None]
    dirty = (keys.masked_fill(hidden, torch.nan), values.masked_fill(hidden, torch.nan))
    found = window_prefill(query, *dirty, **given, backend="triton")
    assert_as_exact_as(found, stock, exact, f"{window}")
    return found


@pytest.mark.parametrize(("sizes", "heads", "head_dim", "dtype", "window"), CASES)
def test_against_reference(
    sizes: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    window: dict[str, Any],
) -> None:
    """Whole prompts and the last rows of longer ones; no padding, some, and a sequence of padding alone."""
    tensors = inputs(sizes, heads, head_dim, dtype)
    steps, n = sizes
    padding = torch.tensor([0, n // 3, n], device=DEVICE)
    found = check(tensors, padding, window)
    assert (found[2] == 0).all(), "a sequence without a token gives zeros"
    rows_of_padding = max(0, n // 3 - (n - steps))
    assert (found[1, :, :rows_of_padding] == 0).all()


def test_every_fraction_has_its_own_floor() -> None:
    """Fractions whose product with a position comes out just below or above an integer, at every position."""
    tensors = inputs((200, 200), (1, 1), 32, torch.float32, batch=1)
    padding = torch.tensor([3], device=DEVICE)
    for fraction in (0.1, 0.29, 0.57, 1 / 3, 2 / 3, 0.7, 1 - 2**-40, 2**-40, 1 - 0.5**0.5):
        check(tensors, padding, {"window_fraction": fraction})


@pytest.mark.parametrize("window", WINDOWS[:5], ids=str)
def test_chunks_make_the_whole(window: dict[str, Any]) -> None:
    """A prompt in chunks of 1 to 128 rows equals the prompt at once, up to the order of summation."""
    query, keys, values = inputs((300, 300), (2, 1), 64, torch.float16, batch=1)
    padding = torch.tensor([37], device=DEVICE)
    whole = check((query, keys, values), padding, window)
    start = 0
    for rows in (128, 1, 31, 100, 40):
        end = start + rows
        parts = (query[:, :, start:end], keys[:, :, :end], values[:, :, :end])
        part = check(parts, padding, window)
        torch.testing.assert_close(part, whole[:, :, start:end], rtol=1e-3, atol=4e-3)
        start = end
    assert start == 300


def test_layouts_are_read_in_place() -> None:
    """Tokens outside heads, a view into a larger cache, padding of either integer type; result likewise."""
    query, keys, values = inputs((111, 111), (6, 2), 80, torch.float32, batch=2)
    padding = torch.tensor([5, 0], device=DEVICE)
    given = {"scale": 0.1, "window_fraction": 0.4, "num_sinks": 3}
    same = window_prefill(query, keys, values, padding=padding, **given, backend="triton")
    room = torch.full((2, 300, 2, 80), torch.nan, device=DEVICE)
    room[:, :111] = keys.transpose(1, 2)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = window_prefill(
        turned, room[:, :111].transpose(1, 2), values, padding=padding.int(), **given, backend="triton"
    )
    assert torch.equal(found, same)
    assert found.transpose(1, 2).is_contiguous(), "as the output projection wants it"
    spread_out = query.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(
        window_prefill(spread_out, keys, values, padding=padding, **given, backend="triton"), same
    )


def test_sixteen_query_heads_share_a_key_head() -> None:
    tensors = inputs((17, 63), (32, 2), 32, torch.float16, batch=1)
    check(tensors, torch.tensor([2], device=DEVICE), WINDOWS[1])


def test_no_padding_is_the_default() -> None:
    tensors = inputs((63, 63), (2, 1), 32, torch.float32)
    zero = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    found = window_prefill(*tensors, scale=0.1, backend="triton")
    assert torch.equal(found, window_prefill(*tensors, scale=0.1, padding=zero, backend="triton"))


def test_large_scores_do_not_overflow() -> None:
    """Scores of 2e4 in fp16: the running maximum must be that of the scaled scores."""
    query, keys, values = inputs((63, 63), (2, 1), 64, torch.float16)
    check((query * 20, keys * 20, values), torch.tensor([0, 9, 60], device=DEVICE), WINDOWS[1])


def test_offsets_beyond_32_bits() -> None:
    """Rows of keys, of values and of queries that 32 bits do not address."""
    far = far_rows(DEVICE)
    far[0, 0, 3] = 1.0
    query, keys, values = (torch.zeros(1, 1, rows, 64, device=DEVICE).half() for rows in (1, 4, 4))
    values[0, 0, 3] = 4.0
    query += 1.0
    on_key = window_prefill(query, far, values, scale=1.0, backend="triton")
    assert (on_key == 4).all(), "slot 3 has all of the weight"
    on_value = window_prefill(query, keys, far, scale=1.0, backend="triton")
    assert (on_value == 0.25).all()
    rows = window_prefill(far, (values / 4).contiguous(), values, scale=1.0, backend="triton")
    assert (rows[0, 0, 3] == 4).all() and (rows[0, 0, 2] == 0).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="compiles FlexAttention; the benchmark itself runs there")
def test_benchmark_rows_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of the toy problem is checked and has its figures; a wrong kernel is not timed."""
    problem = dataclasses.replace(prefill_cases.TOY_PROBLEMS[0], tokens=100)
    rows = list(prefill_cases.prefill_rows(problem, "cpu", torch.float16, (0.0, 0.5)))
    assert [(row["case"], row["fraction"]) for row in rows] == [
        ("sdpa math", 0.0), ("window_prefill", 0.0), ("window_prefill", 0.5),
    ]  # fmt: skip
    assert not any(row["error"] for row in rows) and all(row["tflops"] > 0 for row in rows)
    assert rows[1]["flops"] == 4 * 4 * 64 * 100 * 101 // 2
    mask = reference.visible(torch.arange(100), torch.zeros(1).long(), 100, 0.5, 4, 32, None)
    assert rows[2]["flops_saved"] == pytest.approx(1 - int(mask.sum()) / 5050)
    monkeypatch.setattr(prefill_cases, "_ours", lambda *_: lambda: lambda query, keys, values: query)
    row = list(prefill_cases.prefill_rows(problem, "cpu", torch.float16, (0.5,)))[-1]
    assert row["timing"] is None and row["error"].startswith("wrong result, not timed")


def test_limits_of_the_kernel_are_named() -> None:
    for heads, head_dim, message in (((4, 2), 72, "head_dim = 72"), ((17, 1), 64, "17 query heads per KV")):
        tensors = inputs((3, 15), heads, head_dim, torch.float32)
        with pytest.raises(UsageError, match=message):
            window_prefill(*tensors, scale=1.0, backend="triton")
    tensors = inputs((3, 15), (2, 1), 64, torch.float64)
    with pytest.raises(UsageError, match="float64"):
        window_prefill(*tensors, scale=1.0, backend="triton")


def test_cases_cover_every_value() -> None:
    for axis, values in enumerate((SIZES, HEADS, HEAD_DIM, DTYPES, WINDOWS)):
        assert all(any(case[axis] == value for case in CASES) for value in values)

"""Decode kernels against the reference: in the interpreter without a GPU, compiled and in bf16 with one.

`test_triton_interpreter.py` runs this file in a process of its own, since the interpreter is chosen when
triton is imported.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.merge_state.api import merge_state
from prhs_kernels.ops.spans import candidate_spans, span_mask
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.ops.sparse_decode.reference import kept_indices
from prhs_kernels.ops.split_k.triton import assign
from prhs_kernels.testing.far_rows import far_rows
from prhs_kernels.testing.tolerances import assert_as_exact_as, sum_of_terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 is silently wrong in the interpreter
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LENGTHS = [1, 15, 17, 63, 111, 1000]
HEADS = [(4, 4), (6, 2), (7, 1), (10, 2), (16, 1)]  # query, KV
BATCH = 2


@triton.jit
def assignments_kernel(tiles_ptr, out_ptr, slots, num_rows, BLOCK_R: tl.constexpr):
    rows = tl.arange(0, BLOCK_R)
    tiles = tl.load(tiles_ptr + rows, mask=rows < num_rows, other=0)
    program = tl.program_id(0)
    row, begin, stop, size, active = assign(tiles, slots, program, num_rows, BLOCK_R)
    out_ptr += program * 5
    tl.store(out_ptr, row)
    tl.store(out_ptr + 1, begin)
    tl.store(out_ptr + 2, stop)
    tl.store(out_ptr + 3, size)
    tl.store(out_ptr + 4, active.to(tl.int64))


def inputs(
    length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(length + head_dim)

    def draw(count: int, rows: int) -> torch.Tensor:
        drawn = torch.randn(BATCH, count, rows, head_dim, generator=generator)
        return drawn.to(device=DEVICE, dtype=dtype)

    return draw(heads[0], 1), draw(heads[1], length), draw(heads[1], length), generator


def compare(
    found: tuple[torch.Tensor, ...],
    stock: tuple[torch.Tensor, ...],
    exact: tuple[torch.Tensor, ...],
    terms: float,
) -> None:
    assert_as_exact_as(found[0], stock[0], exact[0], "output")
    assert_as_exact_as(found[1], stock[1], exact[1], "lse", terms)


def spread(*axes: Sequence) -> list[tuple]:
    """Every value of every axis, partners drawn: the interpreter is too slow for the whole product."""
    count = 2 * max(len(axis) for axis in axes)
    shuffle = random.Random(0).sample
    columns = [shuffle((list(axis) * count)[:count], count) for axis in axes]
    return list(dict.fromkeys(zip(*columns, strict=True)))


HEAD_DIM = [32, 64, 80, 96, 128, 256]
SPLITS = [1, 3]
CASES = spread(LENGTHS, HEADS, HEAD_DIM, DTYPES, SPLITS)


@pytest.mark.parametrize(("length", "heads", "head_dim", "dtype", "splits"), CASES)
def test_sparse_decode(
    length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, splits: int
) -> None:
    """Nothing, one, some and all rows kept; rows not kept and the tail of the indices hold poison."""
    query, keys, values, generator = inputs(length, heads, head_dim, dtype)
    kept = torch.rand(BATCH, heads[1], length, generator=generator) < 0.4
    kept[0, 0], kept[1, 0] = False, True
    kept[0, -1] = kept[0, -1] & (heads[1] > 1)
    kept = kept.to(DEVICE)
    indices, count = kept_indices(kept)
    stock = sparse_decode(query, keys, values, indices, scale=0.11, backend="reference")
    exact = sparse_decode(
        *(t.double() for t in (query, keys, values)), indices, scale=0.11, backend="reference"
    )
    for cache in (keys, values):
        cache[~kept] = torch.nan
    behind = indices < 0
    for poisoned in (indices, indices.masked_fill(behind, 10**6).int()):
        given = count.int() if poisoned.dtype == torch.int32 else None
        found = sparse_decode(
            query, keys, values, poisoned, count=given, scale=0.11, num_splits=splits, backend="triton"
        )
        compare(found, stock, exact, sum_of_terms(query, keys, 0.11))
    assert (found[0][0, : heads[0] // heads[1]] == 0).all(), "a head without rows gives zeros"


@pytest.mark.parametrize(("length", "heads", "head_dim", "dtype", "splits"), CASES)
def test_dense_decode(
    length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, splits: int
) -> None:
    query, keys, values, _ = inputs(length, heads, head_dim, dtype)
    used, padding = torch.tensor([length, (length + 1) // 2]), torch.tensor([length // 3, 0])
    variants = [
        None,
        candidate_spans(used, padding),
        candidate_spans(used, padding, sliding_window=13),
        candidate_spans(used, padding, num_sinks=2, num_local=3, window_start=used // 4),
        torch.zeros(BATCH, 4, dtype=torch.int32),
    ]
    for spans in variants:
        spans = None if spans is None else spans.to(DEVICE)
        arguments = {"scale": 0.11, "spans": spans}
        stock = dense_decode(query, keys, values, **arguments, backend="reference")
        exact = dense_decode(*(t.double() for t in (query, keys, values)), **arguments, backend="reference")
        dirty = [keys.clone(), values.clone()]
        if spans is not None:
            for cache in dirty:
                cache.masked_fill_(~span_mask(spans, length)[:, None, :, None], torch.nan)
        found = dense_decode(query, *dirty, **arguments, num_splits=splits, backend="triton")
        compare(found, stock, exact, sum_of_terms(query, keys, 0.11))


def test_fp32_adds_up_little_rounding() -> None:
    """One query head, random queries and keys; on a GPU a single sum along head_dim was too far off."""
    query, keys, values, _ = inputs(300, (2, 2), 128, torch.float32)
    indices = torch.arange(300, device=DEVICE).expand(BATCH, 2, -1)
    arguments = {"indices": indices, "scale": 128**-0.5}
    found = sparse_decode(query, keys, values, **arguments, backend="triton")
    stock = sparse_decode(query, keys, values, **arguments, backend="reference")
    exact = sparse_decode(*(t.double() for t in (query, keys, values)), **arguments, backend="reference")
    compare(found, stock, exact, sum_of_terms(query, keys, 128**-0.5))


@pytest.mark.parametrize("splits", [1, 2, 17, 40])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_merge_state(splits: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(splits)
    output = torch.randn(3, 2, splits, head_dim, generator=generator).to(DEVICE)
    lse = (20 * torch.randn(3, 2, splits, generator=generator)).to(DEVICE)
    empty = torch.rand(3, 2, splits, generator=generator).to(DEVICE) < 0.3
    empty[0, 0], empty[0, 1] = True, False
    lse[empty] = -torch.inf
    stock = merge_state(output, lse, backend="reference")
    exact = merge_state(output.double(), lse.double(), backend="reference")
    output[empty] = torch.nan  # nobody writes the state of an empty split
    compare(merge_state(output, lse, backend="triton"), stock, exact, 0.0)


def test_spans_drop_indices_that_left_the_window() -> None:
    query, keys, values, _ = inputs(111, (4, 2), 64, torch.float32)
    indices = torch.arange(0, 111, 3, dtype=torch.int32, device=DEVICE).expand(BATCH, 2, -1).contiguous()
    spans = torch.tensor([[0, 6, 40, 111], [5, 5, 60, 111]], dtype=torch.int32, device=DEVICE)
    keys.masked_fill_(~span_mask(spans, 111)[:, None, :, None], torch.nan)
    found = sparse_decode(query, keys, values, indices, spans=spans, scale=0.1, backend="triton")
    clean = keys.nan_to_num()
    stock = sparse_decode(query, clean, values, indices, spans=spans, scale=0.1, backend="reference")
    double = (t.double() for t in (query, clean, values))
    exact = sparse_decode(*double, indices, spans=spans, scale=0.1, backend="reference")
    compare(found, stock, exact, sum_of_terms(query, keys, 0.1))


def test_cache_views_are_read_in_place() -> None:
    """A preallocated cache, laid out `[batch, n, heads, head_dim]`, of which a part is in use."""
    query, keys, values, _ = inputs(111, (6, 2), 80, torch.float32)
    room = torch.full((BATCH, 300, 2, 80), torch.nan, device=DEVICE)
    room[:, :111] = keys.transpose(1, 2)
    view = room[:, :111].transpose(1, 2)
    found = dense_decode(query, view, values, scale=0.1, backend="triton")
    same = dense_decode(query, keys, values, scale=0.1, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_offsets_beyond_32_bits() -> None:
    values = torch.randn(1, 1, 4, 64, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    indices = torch.tensor([[[1, 3]]], device=DEVICE)
    query = torch.ones(1, 1, 1, 64, device=DEVICE).half()
    found = sparse_decode(query, far_rows(DEVICE), values, indices, scale=0.1, backend="triton")
    torch.testing.assert_close(
        found[0][0, 0, 0].float(), values[0, 0, [1, 3]].float().mean(0), atol=1e-3, rtol=0
    )


def test_limits_of_the_kernels_are_named() -> None:
    query, keys, values, _ = inputs(15, (4, 2), 72, torch.float32)
    with pytest.raises(UsageError, match="head_dim = 72"):
        dense_decode(query, keys, values, scale=1.0, backend="triton")
    query, keys, values, _ = inputs(15, (34, 2), 64, torch.float32)
    with pytest.raises(UsageError, match="17 query heads per KV head"):
        dense_decode(query, keys, values, scale=1.0, backend="triton")
    with pytest.raises(UsageError, match="float64"):
        dense_decode(query.double(), keys.double(), values.double(), scale=1.0, backend="triton")


def test_cases_cover_every_value() -> None:
    for axis, values in enumerate((LENGTHS, HEADS, HEAD_DIM, DTYPES, SPLITS)):
        assert {case[axis] for case in CASES} == set(values)


@pytest.mark.parametrize("least", [1, 4])
def test_heads_with_very_different_counts(least: int) -> None:
    """One head keeps nearly everything, the others little or nothing; splits have `least` tiles at least."""
    from prhs_kernels.ops.decode_config import DecodeConfig
    from prhs_kernels.ops.sparse_decode import triton as kernel

    query, keys, values, _ = inputs(1000, (8, 4), 64, torch.float32)
    kept = torch.zeros(BATCH, 4, 1000, dtype=torch.bool, device=DEVICE)
    kept[0, 1, :990], kept[0, 2, ::50], kept[1, 0, 5], kept[1, 3, 100:140] = True, True, True, True
    indices, count = kept_indices(kept)
    config = DecodeConfig(16, 4, 2, num_splits=12, least_tiles=least)
    found = kernel.sparse_decode(query, keys, values, indices, count, None, 0.11, config)
    stock = sparse_decode(query, keys, values, indices, scale=0.11, backend="reference")
    exact = sparse_decode(
        *(t.double() for t in (query, keys, values)), indices, scale=0.11, backend="reference"
    )
    compare(found, stock, exact, sum_of_terms(query, keys, 0.11))


@pytest.mark.parametrize("tiles", [[3, 0, 100, 7, 1], [5], [0, 0], [8, 8, 8, 8], [1] * 33])
@pytest.mark.parametrize("slots", [1, 4, 40])
def test_every_tile_has_one_program(tiles: list[int], slots: int) -> None:
    """And no program more than its share."""
    lengths = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    out = torch.full((slots + len(tiles), 5), -1, dtype=torch.int64, device=DEVICE)
    assignments_kernel[(len(out),)](lengths, out, slots, len(tiles), BLOCK_R=64)
    share = max(1, -(-sum(tiles) // slots))
    taken: list[tuple[int, int]] = []
    for row, begin, stop, size, active in out.tolist():
        assert size == share
        if active:
            assert 0 < stop - begin <= share and begin % share == 0
            taken += [(row, tile) for tile in range(begin, stop)]
    assert sorted(taken) == [(row, tile) for row, count in enumerate(tiles) for tile in range(count)]


def test_dense_splits_fill_the_last_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    """132 multiprocessors take three programs each: 64 rows get 6 splits, 7 would start a second wave."""
    from prhs_kernels.ops import decode_config

    monkeypatch.setattr(decode_config, "num_sms", lambda device: 132)
    query = torch.empty(8, 32, 1, 128, dtype=torch.bfloat16)
    assert decode_config.dense_config(query, 8, 32768).num_splits == 6
    query = torch.empty(512, 4, 1, 128, dtype=torch.bfloat16)
    assert decode_config.dense_config(query, 1, 2048).num_splits == 3, (
        "1536 programs in 4 waves, not 512 in 2"
    )


def test_sparse_splits_by_waves_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """132 multiprocessors take three programs each; sets of 1024 are 16 tiles. More programs where a head may
    keep far more than most, but none so small that every head would be split finer."""
    from prhs_kernels.ops import decode_config

    monkeypatch.setattr(decode_config, "num_sms", lambda device: 132)

    def chosen(rows: int, kept: int, max_kept: int = 0) -> tuple[int, int]:
        query = torch.empty(rows, 4, 1, 128, dtype=torch.bfloat16)
        config = decode_config.sparse_config(query, 1, max_kept or kept, mean_kept=kept)
        assert config.num_warps == (4 if 2 * rows <= 3 * 132 else 2), "many rows: four programs of two warps"
        return config.num_splits, config.least_tiles

    assert chosen(64, 1024) == (4, 4), "256 programs, two per multiprocessor, 8 tiles on each; 384 have 9"
    assert chosen(128, 1024) == (3, 6), "384 programs in one wave"
    assert chosen(128, 2048) == (3, 11) and chosen(128, 512) == (2, 4)
    assert chosen(256, 1024) == (2, 8) and chosen(32, 512) == (8, 1)
    assert chosen(512, 256) == (1, 4), "1024 programs and a merge would take longer than 512"
    assert chosen(512, 512) == (1, 8) and chosen(396, 256) == (1, 4)
    assert chosen(8, 1024) == (16, 1)
    assert chosen(64, 1024, 32768) == (16, 4)
    assert chosen(64, 1024, 1200) == (4, 4) and chosen(64, 1024, 2048) == (8, 4)
    assert chosen(64, 1) == (1, 1)

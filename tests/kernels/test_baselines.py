"""Comparison methods against brute force, their own bound, causality and awkward sizes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from prhs_kernels.errors import InputError
from prhs_kernels.selectors.baselines import (
    Baseline,
    DecodeRows,
    OracleTopK,
    Quest,
    StreamingLLM,
    uniform_size,
)

METHODS: list[Baseline] = [OracleTopK(), StreamingLLM(), Quest(), Quest(page_size=3)]
IDS = ["oracle", "streaming", "quest", "quest-3"]


def make_rows(
    length: int = 40,
    steps: int = 5,
    *,
    num_qo_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    window: int | None = None,
    seed: int = 0,
) -> DecodeRows:
    """Random queries at the last `steps` positions, with their own exact attention."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_qo_heads, steps, head_dim, generator=generator)
    keys = torch.randn(num_kv_heads, length, head_dim, generator=generator)
    positions = torch.arange(length - steps, length)
    start = None if window is None else positions - window + 1
    key = torch.arange(length)
    hidden = key > positions[:, None]
    if start is not None:
        hidden = hidden | (key < start[:, None])
    logits = query @ keys.repeat_interleave(num_qo_heads // num_kv_heads, 0).mT
    probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return DecodeRows(query, keys, probs, positions, start)


def retained(rows: DecodeRows, kept: torch.Tensor) -> torch.Tensor:
    return (rows.group_mass * kept).sum(-1)


def constant(rows: DecodeRows, size: int) -> torch.Tensor:
    return torch.full((rows.num_kv_heads, len(rows.positions)), size)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_oracle_is_the_best_of_all_sets_of_its_size(size: int, window: int | None) -> None:
    rows = make_rows(length=9, steps=3, window=window)
    mass = retained(rows, OracleTopK().select(rows, constant(rows, size)).kept)
    for head, step in itertools.product(range(rows.num_kv_heads), range(3)):
        best = max(
            rows.group_mass[head, step, list(chosen)].sum()
            for chosen in itertools.combinations(range(9), size)
        )
        assert mass[head, step] == pytest.approx(float(best), abs=1e-6)


def test_oracle_maximises_the_group_not_a_single_head() -> None:
    # head 0 wants position 0, head 1 position 2; position 1 is second for both and wins the sum
    probs = torch.tensor([[[0.5, 0.4, 0.1, 0.0]], [[0.0, 0.4, 0.6, 0.0]]])
    rows = DecodeRows(torch.zeros(2, 1, 4), torch.zeros(1, 4, 4), probs, torch.tensor([3]))
    assert OracleTopK().select(rows, torch.tensor([[1]])).kept[0, 0].tolist() == [False, True, False, False]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 111])
def test_quest_bound_is_above_every_logit_of_its_page(length: int) -> None:
    rows = make_rows(length=length, steps=1, seed=length)
    bounds = Quest().page_bounds(rows).repeat_interleave(16, -1)[..., :length]
    logits = rows.query @ rows.keys.repeat_interleave(rows.group_size, 0).mT
    assert bool((bounds >= logits - 1e-5).all())
    assert bool(bounds.isfinite().all())


def test_quest_bound_is_attained_by_pages_of_one_key() -> None:
    rows = make_rows(length=20, steps=2)
    logits = rows.query @ rows.keys.repeat_interleave(rows.group_size, 0).mT
    torch.testing.assert_close(Quest(page_size=1).page_bounds(rows), logits)


def test_quest_takes_the_page_with_the_planted_key() -> None:
    rows = make_rows(length=160, steps=4, num_qo_heads=2, num_kv_heads=1)
    keys = rows.keys.clone()
    keys[0, 37] = 100 * rows.query[0, 2]
    kept = Quest().select(dataclasses.replace(rows, keys=keys), constant(rows, 32)).kept
    assert bool(kept[0, 2, 32:48].all())
    assert bool(kept[0, :, 144:156].all())  # the newest page always


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_kept_is_causal_and_inside_the_window(method: Baseline, window: int | None) -> None:
    rows = make_rows(length=50, steps=19, window=window)
    for size in (1, 6, 20, 50, 80):
        kept = method.select(rows, constant(rows, size)).kept
        assert kept.shape == (2, 19, 50) and kept.dtype == torch.bool
        assert not bool((kept & ~rows.visible).any())
        assert bool((kept.sum(-1) >= 1).all())


@pytest.mark.parametrize("method", [OracleTopK(), StreamingLLM(), StreamingLLM(num_sinks=0)])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 39, 40, 41])
@pytest.mark.parametrize("window", [None, 8])
def test_exact_size(method: Baseline, size: int, window: int | None) -> None:
    rows = make_rows(window=window)
    kept = method.select(rows, constant(rows, size)).kept
    assert kept.sum(-1).tolist() == [rows.num_visible.clamp(max=size).tolist()] * 2


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_size_may_differ_per_head_and_step(method: Baseline) -> None:
    rows = make_rows(length=60, steps=6)
    size = torch.tensor([[3, 10, 20, 30, 40, 60], [60, 1, 2, 50, 5, 6]])
    together = method.select(rows, size).kept
    for head, step in itertools.product(range(2), range(6)):
        alone = method.select(rows, constant(rows, int(size[head, step]))).kept
        assert torch.equal(together[head, step], alone[head, step])


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_later_keys_change_nothing(method: Baseline) -> None:
    rows = make_rows(length=60, steps=20)
    keys = rows.keys.clone()
    keys[:, 50:] = 1e4
    changed = method.select(dataclasses.replace(rows, keys=keys), constant(rows, 12)).kept
    before = rows.positions < 50
    assert torch.equal(changed[:, before], method.select(rows, constant(rows, 12)).kept[:, before])


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_no_steps(method: Baseline) -> None:
    rows = make_rows(length=8, steps=0)
    choice = method.select(rows, constant(rows, 4))
    assert choice.kept.shape == (2, 0, 8)
    assert choice.rows_read.shape == choice.retrieved.shape == choice.contested.shape == (2, 0)


def test_streaming_is_sinks_and_local() -> None:
    rows = make_rows(length=20, steps=1)
    kept = StreamingLLM(num_sinks=4).select(rows, constant(rows, 7)).kept
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 17, 18, 19]
    kept = StreamingLLM(num_sinks=4).select(rows, constant(rows, 2)).kept
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 19]


def test_quest_mean_size_is_the_asked_one() -> None:
    # 48 consecutive steps: the fill of the newest page averages out, rounding to pages leaves no bias
    rows = make_rows(length=400, steps=48)
    kept = Quest().select(rows, constant(rows, 64)).kept
    assert float(kept.sum(-1).float().mean()) == pytest.approx(64, abs=1)
    assert int((kept.sum(-1) - 64).abs().max()) <= 8


def test_rows_read_counts_scans() -> None:
    rows = make_rows(length=64, steps=1)
    read = {method.name: method.select(rows, constant(rows, 16)).rows_read for method in METHODS[:3]}
    assert read["oracle"].tolist() == [[64 + 32]] * 2
    assert read["streaming-llm"].tolist() == [[32]] * 2
    assert read["quest"].tolist() == [[2 * 3 + 32]] * 2


def test_what_has_no_choice_is_not_contested() -> None:
    rows = make_rows(length=20, steps=3)
    sizes = torch.tensor([[18, 18, 18], [17, 19, 20]])
    choice = OracleTopK().select(rows, sizes)
    expected = [[False, True, True], [True, False, False]]
    assert choice.contested.tolist() == choice.retrieved.tolist() == expected
    assert not StreamingLLM().select(rows, sizes).retrieved.any()


def test_uniform_size() -> None:
    rows = make_rows(length=101, steps=3)
    assert uniform_size(rows, 1 / 8).tolist() == [[12, 12, 13]] * 2
    assert uniform_size(rows, 1.0).tolist() == [[99, 100, 101]] * 2
    assert uniform_size(rows, 1e-6).tolist() == [[1, 1, 1]] * 2
    assert uniform_size(make_rows(length=101, steps=3, window=30), 0.2).tolist() == [[6, 6, 6]] * 2
    for fraction in (0.0, 1.5):
        with pytest.raises(InputError, match="fraction of the visible"):
            uniform_size(rows, fraction)


def test_mismatched_rows_are_refused() -> None:
    rows = make_rows()
    with pytest.raises(InputError, match="positions has shape"):
        dataclasses.replace(rows, positions=rows.positions[:-1])
    with pytest.raises(InputError, match="multiple of"):
        dataclasses.replace(rows, query=rows.query[:3])
    with pytest.raises(InputError, match="positions must lie"):
        dataclasses.replace(rows, positions=rows.positions + 1)

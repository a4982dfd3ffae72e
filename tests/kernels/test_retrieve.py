"""Importance, top-k and dilation against brute force, with ties, nesting and awkward sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prhs_kernels.ops.retrieve.reference import dilate, importance, top_positions

LENGTHS = [1, 15, 17, 63, 111, 1000]


def chosen(ranks: torch.Tensor) -> list[int]:
    """Positions in order of rank."""
    picked = (ranks >= 0).nonzero().flatten().tolist()
    return sorted(picked, key=lambda i: int(ranks[i]))


def counts(length: int) -> list[int]:
    return sorted({0, 1, 2, 3, length // 2, length - 1, length} & set(range(length + 1)))


@pytest.mark.parametrize("length", LENGTHS)
def test_importance_is_the_group_sum_of_full_softmaxes(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    scores = 3 * torch.randn(2, 4, length, generator=generator, dtype=torch.float64)
    allowed = torch.rand(2, length, generator=generator) < 0.7
    allowed[:, 0] = True
    found = importance(scores, allowed)
    for row in range(2):
        places = [i for i in range(length) if allowed[row, i]]
        expected = [0.0] * length
        for head in range(4):
            total = math.fsum(math.exp(scores[row, head, i]) for i in places)
            for i in places:
                expected[i] += math.exp(scores[row, head, i]) / total
        assert found[row].tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_importance_never_reads_what_is_not_a_candidate() -> None:
    scores = torch.tensor([[[0.0, torch.nan, torch.inf, 0.0]]])
    assert importance(scores, torch.tensor([[True, False, False, True]])).tolist() == [[0.5, 0.0, 0.0, 0.5]]


def test_top_of_importance_maximises_the_retained_mass_of_the_group() -> None:
    """All sets of three out of nine: none keeps more of the group's mass than the top of the sum."""
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(3, 9, generator=generator, dtype=torch.float64)
    probs = scores.softmax(-1)
    allowed = torch.ones(9, dtype=torch.bool)
    ranks = top_positions(importance(scores, allowed), allowed, torch.tensor(3))
    best = max(itertools.combinations(range(9), 3), key=lambda s: float(probs[:, list(s)].sum()))
    assert sorted(chosen(ranks)) == list(best)
    # what each head alone would choose keeps less: the sum is not one head's ranking
    single = [probs[head].topk(3).indices for head in range(3)]
    assert all(probs[:, one].sum() < probs[:, list(best)].sum() for one in single)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_positions_against_sorting(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    weights = torch.rand(len(counts(length)), length, generator=generator, dtype=dtype)
    allowed = torch.rand(weights.shape, generator=generator) < 0.8
    weights[~allowed] = torch.nan  # must not be read
    count = torch.minimum(torch.tensor(counts(length)), allowed.sum(-1))
    ranks = top_positions(weights, allowed, count)
    assert ranks.dtype == torch.int32
    for row in range(len(count)):
        places = [i for i in range(length) if allowed[row, i]]
        places.sort(key=lambda i: (-float(weights[row, i].float()), i))
        assert chosen(ranks[row]) == places[: int(count[row])]


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_go_to_the_oldest_whatever_the_count_and_the_batch(levels: int) -> None:
    """Few distinct values, zeros among them, as where fp32 softmax underflows."""
    generator = torch.Generator().manual_seed(levels)
    weights = torch.randint(levels, (1000,), generator=generator) / 8
    allowed = torch.rand(1000, generator=generator) < 0.9
    total = int(allowed.sum())
    order = sorted((i for i in range(1000) if allowed[i]), key=lambda i: (-float(weights[i]), i))
    for count in (1, 5, 100, 400, total):
        alone = top_positions(weights, allowed, torch.tensor(count))
        assert chosen(alone) == order[:count]
        beside = top_positions(
            weights.expand(2, -1), allowed.expand(2, -1), torch.tensor([count, total - count])
        )
        assert torch.equal(beside[0], alone), "a row must not depend on the count of its neighbours"


def test_nothing_asked_for() -> None:
    none = torch.zeros(3, dtype=torch.long)
    assert (top_positions(torch.rand(3, 5), torch.ones(3, 5, dtype=torch.bool), none) == -1).all()
    empty = torch.zeros(0, dtype=torch.long)
    assert top_positions(torch.rand(0, 5), torch.ones(0, 5, dtype=torch.bool), empty).shape == (0, 5)
    assert dilate(
        torch.full((0, 5), -1, dtype=torch.int32), empty, empty, torch.ones(0, 5, dtype=torch.bool)
    ).shape == (0, 5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_dilation_against_brute_force(length: int, radius: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    allowed = torch.rand(length, generator=generator) < 0.8
    weights = torch.rand(length, generator=generator)
    for count in counts(int(allowed.sum())):
        ranks = top_positions(weights, allowed, torch.tensor(count))
        grown = dilate(ranks, torch.tensor(count), torch.tensor(radius), allowed)
        order = chosen(ranks)
        expected = set(order)
        for seed in order[: count // 3]:
            expected |= {i for i in range(seed - radius, seed + radius + 1) if 0 <= i < length and allowed[i]}
        assert set(grown.nonzero().flatten().tolist()) == expected


def test_every_row_has_its_own_radius_and_count() -> None:
    ranks = torch.full((3, 12), -1, dtype=torch.int32)
    ranks[:, 6], ranks[:, 2], ranks[:, 9] = 0, 1, 2
    allowed = torch.ones(3, 12, dtype=torch.bool)
    allowed[2, 7] = False
    grown = dilate(ranks, torch.tensor([3, 2, 3]), torch.tensor([1, 1, 2]), allowed)
    assert [row.nonzero().flatten().tolist() for row in grown] == [
        [2, 5, 6, 7, 9],  # the best third of three brings its neighbours
        [2, 6, 9],  # a third of two is nobody
        [2, 4, 5, 6, 8, 9],  # radius 2, but 7 may not enter
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_dilated_sets_are_nested_in_the_count(tied: bool) -> None:
    """What conformal risk control rests on: with m = k // 3 and fixed r, a larger k loses no position."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(300, generator=generator)
    if tied:
        weights = (weights * 6).floor() / 8
    allowed = torch.rand(300, generator=generator) < 0.9
    previous = torch.zeros(300, dtype=torch.bool)
    for count in range(int(allowed.sum()) + 1):
        ranks = top_positions(weights, allowed, torch.tensor(count))
        grown = dilate(ranks, torch.tensor(count), torch.tensor(2), allowed)
        assert (grown | ~previous).all(), f"k = {count} dropped a position of k = {count - 1}"
        previous = grown
    assert torch.equal(previous, allowed)

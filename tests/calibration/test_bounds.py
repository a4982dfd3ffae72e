"""Every theorem of `bounds.py`: on random attention, on cases that come close to it, where it is attained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prhs_calibration import bounds
from prhs_calibration.comparison import compare_attention

TOLERANCE = 1e-11  # nats; float64 entropies of at most a few thousand terms


def random_rows(generator: torch.Generator, num_queries: int, num_positions: int, heat: float) -> Tensor:
    logits = heat * torch.randn(num_queries, num_positions, generator=generator, dtype=torch.float64)
    return torch.softmax(logits, -1)


def random_kept(generator: torch.Generator, rows: Tensor, share: float) -> Tensor:
    kept = torch.rand(rows.shape, generator=generator) < share
    return kept.scatter(-1, torch.randint(rows.shape[-1], (*rows.shape[:-1], 1), generator=generator), True)


def truncated(rows: Tensor, kept: Tensor) -> Tensor:
    return bounds.normalised(rows.masked_fill(~kept, 0))


def shapes() -> list[tuple[int, int, float]]:
    sizes = [(1, 1), (1, 5), (2, 2), (2, 3), (3, 2), (7, 63), (16, 16), (33, 17), (5, 111), (64, 200)]
    return [(nq, n, heat) for nq, n in sizes for heat in (0.3, 3.0, 12.0)]


# --- scalar pieces ----------------------------------------------------------------------------------------


def test_binary_entropy_by_hand() -> None:
    assert bounds.binary_entropy(0.5).item() == pytest.approx(math.log(2))
    assert bounds.binary_entropy(torch.tensor([0.0, 1.0])).tolist() == [0, 0]
    assert bounds.binary_entropy(0.1).item() == pytest.approx(0.1 * math.log(10) - 0.9 * math.log(0.9))


def test_mutual_information_by_hand() -> None:
    assert bounds.mutual_information(torch.eye(4)).item() == pytest.approx(math.log(4))
    assert bounds.mutual_information(torch.full((3, 8), 1 / 8)).item() == pytest.approx(0, abs=1e-7)
    # a binary symmetric channel with a uniform input: log 2 - h_b(error)
    channel = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    expected = math.log(2) - bounds.binary_entropy(0.1).item()
    assert bounds.mutual_information(channel).item() == pytest.approx(expected)


def test_mutual_information_from_the_joint_law() -> None:
    """Against the definition: KL of the joint law from the product of its marginals, with weights."""
    generator = torch.Generator().manual_seed(0)
    rows = random_rows(generator, 6, 9, 2.0).expand(4, 6, 9)
    weights = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    law = weights / weights.sum(-1, keepdim=True)
    joint = law.unsqueeze(-1) * rows
    product = law.unsqueeze(-1) * joint.sum(-2, keepdim=True)
    expected = (joint * (joint / product).log()).sum((-2, -1))
    torch.testing.assert_close(bounds.mutual_information(rows, weights), expected)


def test_mutual_information_keeps_leading_dimensions_and_float32_rows() -> None:
    rows = torch.softmax(3 * torch.randn(2, 3, 5, 70, generator=torch.Generator().manual_seed(1)), -1)
    single = torch.stack([torch.stack([bounds.mutual_information(h.double()) for h in b]) for b in rows])
    assert bounds.mutual_information(rows).shape == (2, 3)
    torch.testing.assert_close(bounds.mutual_information(rows), single, rtol=0, atol=1e-7)


# --- theorem 1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nq, n, heat", shapes())
def test_truncation_moves_exactly_the_dropped_mass(nq: int, n: int, heat: float) -> None:
    generator = torch.Generator().manual_seed(nq * n)
    rows = random_rows(generator, nq, n, heat)
    kept = random_kept(generator, rows, 0.5)
    sparse, delta = truncated(rows, kept), bounds.dropped_mass(rows, kept)
    torch.testing.assert_close(bounds.total_variation(rows, sparse), delta)
    kl = (torch.xlogy(sparse, sparse) - torch.xlogy(sparse, rows)).sum(-1)
    torch.testing.assert_close(bounds.truncation_kl(delta), kl)


# --- theorems 2 and 6 -------------------------------------------------------------------------------------


def test_output_error_identity_and_bound() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        rows, values = random_rows(generator, 4, 13, 2.0), torch.randn(13, 5, generator=generator).double()
        kept = random_kept(generator, rows, 0.4)
        error = (rows - truncated(rows, kept)) @ values
        torch.testing.assert_close(bounds.output_error_exact(rows, kept, values), error)
        limit = bounds.output_error_bound(bounds.dropped_mass(rows, kept), torch.cdist(values, values).max())
        assert bool((error.norm(dim=-1) <= limit + TOLERANCE).all())


def test_output_error_bound_is_attained() -> None:
    rows = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    kept = torch.tensor([False, False, True])
    values = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    error = (rows - truncated(rows, kept)) @ values
    assert error.norm().item() == pytest.approx(bounds.output_error_bound(0.5, 5.0).item())


def test_replaced_keys_and_values() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        rows, frozen = random_rows(generator, 4, 9, 2.0), random_rows(generator, 4, 9, 2.0)
        values = torch.randn(9, 6, generator=generator).double()
        replaced = values + 0.3 * torch.randn(9, 6, generator=generator).double()
        keys_term = bounds.output_error_bound(
            bounds.total_variation(rows, frozen), torch.cdist(values, values).max()
        )
        values_term = bounds.replaced_value_error(frozen, values, replaced)
        error = (rows @ values - frozen @ replaced).norm(dim=-1)
        assert bool((error <= keys_term + values_term + TOLERANCE).all())
        assert not bool((error <= keys_term).all()) or not bool((error <= values_term).all())
    shifted = values + 1.0  # same rows, all values moved alike: equality
    torch.testing.assert_close(
        ((rows @ values) - (rows @ shifted)).norm(dim=-1), bounds.replaced_value_error(rows, values, shifted)
    )


# --- theorems 3, 4, 5 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nq, n, heat", shapes())
def test_information_bounds_on_random_truncations(nq: int, n: int, heat: float) -> None:
    generator = torch.Generator().manual_seed(17 * nq + n)
    rows = torch.stack([random_rows(generator, nq, n, heat) for _ in range(60)])
    shares = torch.linspace(0.02, 1.0, 60).view(-1, 1, 1)
    kept = torch.rand(rows.shape, generator=generator) < shares
    kept[..., 0] = True
    weights = torch.rand(60, nq, generator=generator, dtype=torch.float64)
    for law in (None, weights):
        result = compare_attention(rows, truncated(rows, kept), kept, law)
        assert result.violations == []
        assert bool((result.fano <= result.marginal + TOLERANCE).all())
        torch.testing.assert_close(result.delta, bounds.dropped_mass(rows, kept))


def test_information_bounds_on_random_pairs_of_rows() -> None:
    """Frozen keys: only a total variation relates the rows, and there is no theorem 4 to check."""
    generator = torch.Generator().manual_seed(5)
    for mix in torch.linspace(0, 1, 40).tolist():
        rows = torch.stack([random_rows(generator, 9, 12, 4.0) for _ in range(25)])
        other = torch.stack([random_rows(generator, 9, 12, 4.0) for _ in range(25)])
        result = compare_attention(rows, (1 - mix) * rows + mix * other)
        assert result.violations == [] and result.truncation is None
        assert set(result.checks) == {"fano", "fano envelope", "marginal"}


def near_tight(num_special: int, num_common: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """`num_special` queries hold all but `epsilon` of their mass at their own, dropped positions."""
    rows = torch.zeros(num_special + num_common, num_special + 1, dtype=torch.float64)
    rows[:num_special, 1:] = (1 - epsilon) * torch.eye(num_special, dtype=torch.float64)
    rows[:num_special, 0] = epsilon
    rows[num_special:, 0] = 1
    kept = torch.zeros_like(rows, dtype=torch.bool)
    kept[:, 0] = True
    return rows, kept


@pytest.mark.parametrize("special, common", [(1, 1), (1, 9), (5, 3), (16, 200), (40, 2)])
def test_fano_bound_comes_as_close_to_the_loss_as_one_likes(special: int, common: int) -> None:
    rows, kept = near_tight(special, common, 1e-5)
    result = compare_attention(rows, truncated(rows, kept), kept)
    assert result.violations == []
    assert 0.999 < (result.information_loss / result.fano).item() <= 1


@pytest.mark.parametrize("special, common", [(1, 1), (5, 3), (16, 200)])
def test_fano_bound_comes_as_close_to_the_gain_as_one_likes(special: int, common: int) -> None:
    """Sparse attention can be *more* informative: drop what all queries share."""
    rows, _ = near_tight(special, common, 1 - 1e-5)
    kept = rows > 0
    kept[:special, 0] = False
    result = compare_attention(rows, truncated(rows, kept), kept)
    assert result.violations == []
    assert 0.999 < (-result.information_loss / result.fano).item() <= 1


@pytest.mark.parametrize("special, common", [(1, 3), (6, 1), (16, 200)])
def test_fano_bound_is_attained_by_total_variation(special: int, common: int) -> None:
    rows, _ = near_tight(special, common, 0.0)
    collapsed = torch.zeros_like(rows)
    collapsed[:, 0] = 1
    for result in (compare_attention(rows, collapsed), compare_attention(collapsed, rows)):
        assert result.violations == []
        torch.testing.assert_close(result.information_loss.abs(), result.fano)


@pytest.mark.parametrize("delta", [1e-6, 0.02, 0.5, 0.999])
def test_truncation_bound_is_attained(delta: float) -> None:
    num_queries = 12
    rows, kept = near_tight(num_queries, 0, 1 - delta)
    result = compare_attention(rows, truncated(rows, kept), kept)
    assert result.violations == []
    assert result.truncation is not None
    torch.testing.assert_close(result.information_loss, result.truncation, rtol=1e-9, atol=0)
    assert result.truncation.item() == pytest.approx(delta * math.log(num_queries))


def test_truncation_bound_is_not_a_bound_on_the_gain() -> None:
    """The loss direction only: here sparse attention gains 0.48 nats where the loss is bounded by 0.22."""
    rows = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    kept = torch.tensor([[False, True], [True, True]])
    result = compare_attention(rows, truncated(rows, kept), kept)
    assert result.truncation is not None and result.violations == []
    assert -result.information_loss.item() > result.truncation.item() + 0.2


def test_envelope_is_concave_nondecreasing_and_above_g() -> None:
    delta = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for nq, n in [(2, 2), (2, 50), (50, 2), (7, 7), (128, 4096)]:
        envelope = bounds.fano_envelope(delta, nq, n)
        assert bool((envelope.diff() >= -1e-15).all())
        assert bool((envelope.diff().diff() <= 1e-15).all())
        limit = math.log(min(nq, n))
        g = bounds.fano_bound(delta, nq, n)
        assert bool((envelope >= g.clamp(max=limit) - 1e-15).all())
        assert envelope[-1].item() <= limit + 1e-15
    assert bounds.fano_envelope(0.3, 1, 50).item() == 0
    assert bounds.fano_envelope(0.3, 50, 1).item() == 0
    assert bounds.fano_bound(0.3, 1, 50).item() == 0


def test_envelope_covers_the_mean_over_prompts() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = torch.stack([random_rows(generator, 10, 30, 5.0) for _ in range(300)])
    shares = torch.rand(300, 1, 1, generator=generator)
    kept = torch.rand(rows.shape, generator=generator) < shares
    kept[..., 3] = True
    result = compare_attention(rows, truncated(rows, kept), kept)
    limit = bounds.fano_envelope(result.delta_mean.mean(), 10, 30)
    assert result.information_loss.abs().mean().item() <= limit.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checks_hold_for_softmax_along_two_routes(dtype: torch.dtype) -> None:
    """Rows as the scorer makes them: dense and sparse softmax computed apart, in the stored precision."""
    generator = torch.Generator().manual_seed(7)
    for heat in (0.1, 5.0, 25.0):
        logits = heat * torch.randn(6, 20, 700, generator=generator, dtype=dtype)
        seen = torch.arange(700) <= torch.arange(680, 700).unsqueeze(-1)
        logits = logits.masked_fill(~seen, -torch.inf)
        kept = (torch.rand(logits.shape, generator=generator) < 0.3) & seen
        kept[..., 0] = True
        sparse = torch.softmax(logits.masked_fill(~kept, -torch.inf), -1)
        result = compare_attention(torch.softmax(logits, -1), sparse, kept)
        assert result.violations == []
        assert result.slack < 1e-11


def test_a_bug_in_the_sparse_rows_is_reported() -> None:
    """What the checks are for: a kept set that is not the one attended, rows that are no truncation, NaN."""
    generator = torch.Generator().manual_seed(8)
    rows = random_rows(generator, 8, 40, 3.0)
    kept = random_kept(generator, rows, 0.5)
    sparse = truncated(rows, kept)
    shifted = kept.roll(1, -1)
    assert "total variation" in compare_attention(rows, sparse, shifted).violations
    assert "kl" in compare_attention(rows, sparse, shifted).violations
    assert "total variation" in compare_attention(rows, random_rows(generator, 8, 40, 3.0), kept).violations
    broken = sparse.clone()
    broken[2, 3] = torch.nan
    assert "fano" in compare_attention(rows, broken, kept).violations


def test_a_wrong_truncation_is_reported_by_theorem_4() -> None:
    """Rows that moved further than the recorded set says lose more than its bound allows."""
    rows, kept = near_tight(12, 0, 0.5)
    all_kept = torch.ones_like(kept)
    assert "truncation" in compare_attention(rows, truncated(rows, kept), all_kept).violations


# --- theorems 7 and 8 -------------------------------------------------------------------------------------


def test_chain_of_truncations_is_exact_and_below_the_sum() -> None:
    generator = torch.Generator().manual_seed(9)
    rows = random_rows(generator, 50, 40, 2.0)
    stages, kept, current = [], torch.ones_like(rows, dtype=torch.bool), rows
    for _ in range(3):
        kept = kept & random_kept(generator, rows, 0.8)
        kept[:, 0] = True
        stages.append(bounds.dropped_mass(current, kept))
        current = truncated(current, kept)
    deltas = torch.stack(stages, -1)
    total = bounds.total_variation(rows, current)
    torch.testing.assert_close(bounds.chain_truncations(deltas), total)
    assert bool((total <= bounds.chain_bound(deltas) + TOLERANCE).all())


def test_chain_bound_with_replaced_rows() -> None:
    generator = torch.Generator().manual_seed(10)
    stages = [random_rows(generator, 100, 20, 1.0) for _ in range(4)]
    deltas = torch.stack([bounds.total_variation(a, b) for a, b in zip(stages, stages[1:], strict=False)], -1)
    assert bool((bounds.total_variation(stages[0], stages[-1]) <= bounds.chain_bound(deltas)).all())


def test_stand_alone_deltas_do_not_add() -> None:
    """Why the chain: freezing that changes the top-k loses more than both losses measured on their own."""

    def top1(p: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(p.argmax(), 2).bool()

    dense = torch.tensor([0.9, 0.1], dtype=torch.float64)
    frozen = torch.tensor([0.49, 0.51], dtype=torch.float64)
    layer = bounds.total_variation(dense, frozen)
    alone = bounds.dropped_mass(dense, top1(dense)) + layer
    chained = bounds.dropped_mass(frozen, top1(frozen)) + layer
    both = bounds.total_variation(dense, truncated(frozen, top1(frozen)))
    assert alone.item() < both.item() <= chained.item() + TOLERANCE


def test_output_level_bound() -> None:
    generator = torch.Generator().manual_seed(11)
    p, other = random_rows(generator, 30, 64, 3.0), random_rows(generator, 30, 64, 3.0)
    for mix in (0.0, 0.01, 0.1, 0.5):
        q = (1 - mix) * p + mix * other
        change = (bounds.mutual_information(p) - bounds.mutual_information(q)).abs()
        limit = bounds.output_level_bound(bounds.total_variation(p, q).mean(), 30, 64)
        assert change.item() <= limit.item() + TOLERANCE


# --- drift of the query -----------------------------------------------------------------------------------


def test_drift_bound_on_random_logits() -> None:
    generator = torch.Generator().manual_seed(12)
    for size in (0.01, 0.3, 2.0, 10.0):
        z = 3 * torch.randn(400, 25, generator=generator, dtype=torch.float64)
        moved = z + size * torch.rand(400, 25, generator=generator, dtype=torch.float64) + 5.0
        s = bounds.logit_range(z, moved)
        before, after = torch.softmax(z, -1), torch.softmax(moved, -1)
        assert bool((bounds.total_variation(before, after) <= bounds.drift_bound(s) + TOLERANCE).all())
        kept = random_kept(generator, before, 0.5)
        limit = bounds.dropped_mass_after_drift(bounds.dropped_mass(before, kept), s)
        assert bool((bounds.dropped_mass(after, kept) <= limit + TOLERANCE).all())


@pytest.mark.parametrize("s", [0.1, 1.0, 8.0])
def test_drift_bounds_are_attained(s: float) -> None:
    z = torch.tensor([-s / 4, s / 4], dtype=torch.float64)
    tv = bounds.total_variation(torch.softmax(z, -1), torch.softmax(-z, -1))
    torch.testing.assert_close(bounds.logit_range(z, -z), torch.tensor(s, dtype=torch.float64))
    torch.testing.assert_close(tv, bounds.drift_bound(s))
    kept = torch.tensor([True, False])
    before, after = torch.softmax(-z, -1), torch.softmax(z, -1)
    torch.testing.assert_close(
        bounds.dropped_mass(after, kept),
        bounds.dropped_mass_after_drift(bounds.dropped_mass(before, kept), s),
    )


def test_drift_after_a_range_without_limit() -> None:
    assert bounds.drift_bound(1e6).item() == 1
    assert bounds.dropped_mass_after_drift(torch.tensor([0.0, 0.1]), 1e6).tolist() == [0, 1]


def test_query_distance_and_paper_bound() -> None:
    """Ours is at most half of the paper's on the same keys; both hold; lengths other than 1 are covered."""
    generator = torch.Generator().manual_seed(13)
    d = 16
    keys = torch.randn(50, d, generator=generator, dtype=torch.float64)
    anchor = torch.nn.functional.normalize(torch.randn(300, d, generator=generator).double(), dim=-1)
    query = torch.nn.functional.normalize(anchor + 0.4 * torch.randn(300, d, generator=generator), dim=-1)
    cosine = (anchor * query).sum(-1)
    torch.testing.assert_close((query - anchor).norm(dim=-1), bounds.query_distance(cosine))
    scale, k_max = d**-0.5, keys.norm(dim=-1).max()
    z, moved = scale * anchor @ keys.T, scale * query @ keys.T
    s = bounds.logit_range_bound(bounds.query_distance(cosine), torch.cdist(keys, keys).max(), scale)
    assert bool((bounds.logit_range(z, moved) <= s + TOLERANCE).all())
    drift = 2 * bounds.total_variation(torch.softmax(z, -1), torch.softmax(moved, -1))
    paper = bounds.paper_drift_bound(cosine, k_max, d)
    assert bool((drift <= 2 * bounds.drift_bound(s)).all()) and bool((drift <= paper / 2).all())
    assert bool((2 * bounds.drift_bound(s) <= paper / 2 + TOLERANCE).all())
    lengths = torch.rand(300, 2, generator=generator).double() + 0.5
    long_query, long_anchor = query * lengths[:, :1], anchor * lengths[:, 1:]
    torch.testing.assert_close(
        (long_query - long_anchor).norm(dim=-1), bounds.query_distance(cosine, lengths[:, 0], lengths[:, 1])
    )


def test_paper_retained_loss_bound() -> None:
    """The set of the anchor, reused: its retained mass is below the oracle's by at most `2 Δ_att`."""
    generator = torch.Generator().manual_seed(14)
    z = 2 * torch.randn(200, 30, generator=generator, dtype=torch.float64)
    moved = z + 0.7 * torch.randn(200, 30, generator=generator, dtype=torch.float64)
    before, after = torch.softmax(z, -1), torch.softmax(moved, -1)
    reused = torch.gather(after, -1, before.topk(6).indices).sum(-1)
    shortfall = after.topk(6).values.sum(-1) - reused
    drift = 2 * bounds.total_variation(before, after)
    assert bool((shortfall <= drift + TOLERANCE).all())
    assert bool((shortfall <= bounds.paper_retained_loss_bound(drift)).all())

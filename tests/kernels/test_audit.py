"""The audit's interval on planted truth: it covers as often as promised, and wrong versions do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from prhs_kernels.errors import UsageError
from prhs_kernels.runtime.audit import Audit

RUNS = 2000
CONFIDENCE = 0.9
P = 0.05


def masses(kind: str, rng: np.random.Generator, units: int) -> np.ndarray:
    """Dropped mass of every unit in order."""
    if kind == "zero":
        return np.zeros(units)
    if kind == "small":
        return rng.beta(0.3, 10, units)
    if kind == "rare":  # almost always nothing, sometimes everything
        return (rng.random(units) < 0.01).astype(float)
    drift = np.linspace(0, 0.2, units)  # "drift": no constant mean to test against
    return np.clip(drift + 0.05 * rng.standard_normal(units), 0, 1)


def audit(mass: np.ndarray, coin: np.ndarray, retrieved: np.ndarray, p: float = P) -> Audit:
    others = ~retrieved
    picked = coin & others
    return Audit(
        exact_units=retrieved.sum(),
        exact_mass=mass[retrieved].sum(),
        other_units=others.sum(),
        audited_units=picked.sum(),
        audited_mass=mass[picked].sum(),
        probability=p,
    )


def most_misses(level: float) -> int:
    """Exceeded with probability below 1e-6 if a miss has at most this probability."""
    return int(scipy.stats.binom.isf(1e-6, RUNS, level))


@pytest.mark.parametrize("kind", ["zero", "small", "rare", "drift"])
def test_the_interval_covers_the_mean_of_the_run(kind: str) -> None:
    rng = np.random.default_rng(0)
    below = above = 0
    estimates, truths = [], []
    for _ in range(RUNS):
        mass = masses(kind, rng, 800)
        # retrievals happen where much would be dropped: they are no sample of the rest
        retrieved = rng.random(800) < np.where(mass > 0.05, 0.5, 0.1)
        found = audit(mass, rng.random(800) < P, retrieved)
        lower, upper = found.interval(CONFIDENCE)
        below += mass.mean() > upper
        above += mass.mean() < lower
        estimates.append(found.estimate)
        truths.append(mass.mean())
    assert below <= most_misses((1 - CONFIDENCE) / 2) and above <= most_misses((1 - CONFIDENCE) / 2)
    spread = np.std(np.array(estimates) - truths) / math.sqrt(RUNS)
    assert abs(np.mean(estimates) - np.mean(truths)) <= 5 * spread + 1e-12, "unbiased"


def test_pooling_without_weights_is_caught() -> None:
    """What method and test are for: the same data, every audited unit counted once."""
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(200):
        mass = masses("small", rng, 800)
        retrieved = rng.random(800) < np.where(mass < 0.02, 0.5, 0.1)
        found = audit(mass, rng.random(800) < P, retrieved)
        pooled = (found.exact_mass + found.audited_mass) / (found.exact_units + found.audited_units)
        errors.append(pooled - mass.mean())
    assert abs(np.mean(errors)) > 10 * np.std(errors) / math.sqrt(200)


def test_it_holds_at_every_step_at_once() -> None:
    """Looking after every unit and stopping at the worst moment does not break it."""
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(400):
        mass = masses("drift", rng, 400)
        coin, retrieved = rng.random(400) < P, np.zeros(400, dtype=bool)
        for end in range(20, 401, 20):
            found = audit(mass[:end], coin[:end], retrieved[:end])
            lower, upper = found.interval(CONFIDENCE)
            if not lower <= mass[:end].mean() <= upper:
                missed += 1
                break
    assert missed <= int(scipy.stats.binom.isf(1e-6, 400, 1 - CONFIDENCE))


def test_it_holds_for_units_that_react_to_the_coin() -> None:
    """After an audit that finds much, the next twenty units drop little; looked at after every unit."""
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(200):
        coin, noise = rng.random(400) < P, rng.random(400)
        mass, calm = np.zeros(400), 0
        for t in range(400):
            mass[t] = 0.01 if calm > 0 else 0.2 * noise[t]
            calm = 20 if coin[t] and mass[t] > 0.1 else calm - 1
        totals, found = np.cumsum(mass), np.cumsum(mass * coin)
        for end in range(1, 401):
            lower, upper = Audit(0, 0.0, end, coin[:end].sum(), found[end - 1], P).interval(CONFIDENCE)
            if not lower <= totals[end - 1] / end <= upper:
                missed += 1
                break
    assert missed <= int(scipy.stats.binom.isf(1e-6, 200, 1 - CONFIDENCE))


def test_retrievals_are_no_sample_of_the_rest() -> None:
    """Half of the units retrieve, where little is dropped: pooling says 0.0076 where 0.024 is true."""
    retrieved = np.tile([True, False], 20_000)
    mass = np.where(retrieved, 0.004, 0.044)
    coin = np.random.default_rng(5).random(retrieved.shape) < 0.1
    found = audit(mass, coin, retrieved, 0.1)
    pooled = (found.exact_mass + found.audited_mass) / (found.exact_units + found.audited_units)
    lower, upper = found.interval()
    assert mass.mean() == pytest.approx(0.024) and pooled == pytest.approx(0.0076, abs=5e-4)
    assert found.estimate == pytest.approx(0.024, abs=1.5e-3) and pooled < lower < 0.024 < upper


def test_a_bound_without_its_penalty_would_miss() -> None:
    """Or the coverage tests could not fail."""
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(RUNS):
        mass = masses("rare", rng, 800)
        found = audit(mass, rng.random(800) < P, np.zeros(800, dtype=bool))
        missed += mass.sum() > found._others(0.0)[1]
    assert missed > most_misses((1 - CONFIDENCE) / 2)


def test_three_verdicts() -> None:
    def found(audited: int, mass: float) -> Audit:
        return Audit(0, 0.0, audited / P, audited, mass, P)

    assert found(100, 0.0).verdict(0.02) == "undecided", "too few, even without any mass"
    assert found(1000, 0.0).verdict(0.02) == "held"
    assert found(1000, 100.0).verdict(0.02) == "violated"
    assert found(1000, 20.0).verdict(0.02) == "undecided"
    needed = found(100, 0.0).units_for_held(0.02)
    assert found(needed, 0.0).verdict(0.02) == "held" and found(needed - 5, 0.0).verdict(0.02) == "undecided"
    assert 250 < needed < 320  # log(G / (α/2)) / δ, G values of a and two sides


def test_exact_units_need_no_coin() -> None:
    known = Audit(
        exact_units=50, exact_mass=1.0, other_units=0, audited_units=0, audited_mass=0, probability=0
    )
    assert known.interval() == (0.02, 0.02) and known.estimate == 0.02
    assert known.verdict(0.02) == "held" and known.verdict(0.019) == "violated"
    everything = Audit(0, 0.0, 50, 50, 1.0, probability=1.0)
    assert everything.interval() == (0.02, 0.02)
    nothing = Audit(0, 0.0, 0, 0, 0.0, probability=0.0)
    assert math.isnan(nothing.estimate) and nothing.verdict(0.02) == "undecided"
    with pytest.raises(UsageError, match="audit probability = 0"):
        Audit(0, 0.0, 5, 0, 0.0, probability=0)
    with pytest.raises(UsageError, match="confidence = 1"):
        known.interval(1.0)


def test_the_interval_never_leaves_what_is_possible() -> None:
    few = Audit(
        exact_units=10, exact_mass=2.0, other_units=10, audited_units=4, audited_mass=1.0, probability=0.4
    )
    lower, upper = few.interval()
    assert lower == pytest.approx(3.0 / 20) and upper == pytest.approx((2.0 + 1.0 + 6.0) / 20)
    assert few.to_dict(0.5)["audit_verdict"] == "held"

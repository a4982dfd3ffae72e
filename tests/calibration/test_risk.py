"""Promises on planted truth: seeded simulations, judged with the exact binomial slack.

A check passes when the number of broken promises among the repetitions is not above the `1 - 1e-6` quantile
of the binomial law that the promise implies. Beside each promise stands a broken version that must fail the
same check.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, binom

from prhs_calibration import betting, risk
from prhs_calibration.betting import Verdict
from prhs_calibration.risk import Target
from prhs_kernels.errors import InputError, UsageError

Array = NDArray[np.float64]
FLUKE = 1e-6


def within_promise(broken: int, repetitions: int, allowed: float) -> bool:
    return broken <= binom.ppf(1 - FLUKE, repetitions, allowed)


# --- conformal risk control -------------------------------------------------------------------------------


def threshold_losses(rng: np.random.Generator, n: int, dial: Array) -> Array:
    """Loss 1 until the dial passes the prompt's own threshold: risk at λ is exactly `1 - λ`, dense loses
    0."""
    return (dial < rng.random((n, 1))).astype(float)


def fresh_failures(
    choose: Callable[[Array], int],
    draw: Callable[[np.random.Generator], Array],
    true_risk: Array,
    rng: np.random.Generator,
    repetitions: int,
) -> int:
    """One fresh prompt per repetition, with loss 0 or 1 at the chosen point."""
    return sum(bool(rng.random() < true_risk[choose(draw(rng))]) for _ in range(repetitions))


def test_conformal_promise_on_monotone_losses() -> None:
    delta, n, dial = 0.02, 50, np.linspace(0.9, 1.0, 201)
    rng = np.random.default_rng(0)

    def draw(rng: np.random.Generator) -> Array:
        return threshold_losses(rng, n, dial)

    def without_plus_one(loss: Array) -> int:
        return int(np.argmax(loss.mean(0) <= delta))

    failures = fresh_failures(lambda x: risk.choose_dial(x, delta).index, draw, 1 - dial, rng, 4000)
    assert within_promise(failures, 4000, delta)
    assert failures > 40  # and it is not merely dense: the promise is nearly used up
    assert not within_promise(fresh_failures(without_plus_one, draw, 1 - dial, rng, 4000), 4000, delta)


def test_conformal_promise_on_losses_that_are_not_monotone() -> None:
    """Every point but dense fails 6 % of the prompts; noise makes some of 60 look good. Needs the running
    maximum."""
    delta, n, num_points, bad = 0.02, 60, 61, 0.06
    true_risk = np.append(np.full(num_points - 1, bad), 0.0)
    rng = np.random.default_rng(1)

    def draw(rng: np.random.Generator) -> Array:
        return (rng.random((n, num_points)) < true_risk).astype(float)

    def without_maximum(loss: Array) -> int:
        return int(np.argmax((n * loss.mean(0) + 1) / (n + 1) <= delta))

    failures = fresh_failures(lambda x: risk.choose_dial(x, delta).index, draw, true_risk, rng, 3000)
    assert within_promise(failures, 3000, delta)
    assert not within_promise(fresh_failures(without_maximum, draw, true_risk, rng, 3000), 3000, delta)


def test_conformal_choice_by_hand() -> None:
    loss = np.zeros((99, 4))
    loss[:, 0], loss[:, 1], loss[:49, 2] = 0.5, 0.011, 0.02
    choice = risk.choose_dial(loss, 0.02)
    assert (choice.index, choice.num_prompts, choice.target) == (2, 99, Target.EXPECTED)
    assert choice.evidence == pytest.approx((49 * 0.02 + 1) / 100)
    assert choice.risk == pytest.approx(49 * 0.02 / 99)
    # the running maximum lifts point 1 to (49 * 0.02 + 50 * 0.011 + 1) / 100 = 0.0253
    assert risk.choose_dial(loss, 0.025).index == 2
    assert risk.choose_dial(loss, 0.026).index == 1
    assert risk.choose_dial(loss, 0.011).index == 3


def test_running_maximum_looks_towards_dense() -> None:
    np.testing.assert_array_equal(
        risk.running_maximum([[0.1, 0.4, 0.2, 0.3, 0.0]]), [[0.4, 0.4, 0.3, 0.3, 0.0]]
    )


@pytest.mark.parametrize("delta, needed", [(0.02, 49), (0.1, 9), (0.05, 19), (0.03, 33), (0.5, 1), (0.9, 1)])
def test_prompts_needed_for_the_expected_loss(delta: float, needed: int) -> None:
    assert risk.prompts_needed(delta) == needed
    assert risk.choose_dial(np.zeros((needed, 3)), delta).index == 0
    if needed > 1:
        with pytest.raises(UsageError, match=f"at least {needed} are needed"):
            risk.choose_dial(np.zeros((needed - 1, 3)), delta)


def test_prompts_needed_with_high_probability() -> None:
    assert risk.prompts_needed(0.02, Target.HIGH_PROBABILITY, 0.95) == 149
    loss = np.zeros((149, 3))
    assert risk.choose_dial(loss, 0.02, Target.HIGH_PROBABILITY).index == 0
    with pytest.raises(UsageError, match="at least 149 are needed"):
        risk.choose_dial(loss[1:], 0.02, "high-probability")


def test_unusable_tables_of_losses() -> None:
    good = np.zeros((60, 3))
    with pytest.raises(InputError, match=r"\[prompts, dial points\]"):
        risk.choose_dial(good[0], 0.02)
    with pytest.raises(InputError, match="densest dial point"):
        risk.choose_dial(good + 0.1, 0.02)
    for wrong in (-0.1, 1.1, np.nan, np.inf):
        with pytest.raises(InputError, match="lies in"):
            risk.choose_dial(np.where(good == 0, wrong, 0), 0.02)
    for wrong in (0.0, 1.0, -1.0, np.nan):
        with pytest.raises(UsageError, match="between 0 and 1"):
            risk.choose_dial(good, wrong)
    with pytest.raises(UsageError, match="no prompts"):
        betting.decide([], 0.02)


# --- learn then test --------------------------------------------------------------------------------------


def test_high_probability_promise() -> None:
    """All sparse points are just above δ with losses 0 or 1, the hardest case. Testing each alone must
    fail."""
    delta, n, num_points, alpha = 0.02, 150, 40, 0.05
    true_risk = np.append(np.full(num_points - 1, delta * 1.001), 0.0)
    rng = np.random.default_rng(2)
    broken = broken_unordered = 0
    for _ in range(1000):
        loss = (rng.random((n, num_points)) < true_risk).astype(float)
        index = risk.choose_dial(loss, delta, Target.HIGH_PROBABILITY, 1 - alpha).index
        broken += int(true_risk[index] > delta)
        broken_unordered += int((betting.betting_p_value(loss.T[:-1], delta) <= alpha).any())
    assert within_promise(broken, 1000, alpha)
    assert broken > 15  # near the level: the test is as powerful as this law allows
    assert not within_promise(broken_unordered, 1000, alpha)


def test_high_probability_choice_stops_at_the_first_failure() -> None:
    loss = np.zeros((400, 4))
    loss[:, 1] = 0.05
    assert risk.choose_dial(loss, 0.02, Target.HIGH_PROBABILITY).index == 2
    assert risk.choose_dial(loss, 0.02).index == 2  # the running maximum gives the same


def test_high_probability_choice_finds_low_losses() -> None:
    rng = np.random.default_rng(3)
    means = np.array([0.04, 0.022, 0.012, 0.005, 0.0])
    loss = np.clip(means * rng.gamma(4, 0.25, (450, 1)), 0, 1)
    assert risk.choose_dial(loss, 0.02, Target.HIGH_PROBABILITY).index == 2


# --- confidence bounds ------------------------------------------------------------------------------------

LAWS = {
    "rare ones": (lambda rng, size: (rng.random(size) < 0.02).astype(float), 0.02),
    "rare halves": (lambda rng, size: 0.5 * (rng.random(size) < 0.01), 0.005),
    "mostly ones": (lambda rng, size: (rng.random(size) < 0.97).astype(float), 0.97),
    "two small points": (lambda rng, size: np.where(rng.random(size) < 0.05, 0.1, 0.005), 0.00975),
    "skewed beta": (lambda rng, size: rng.beta(0.2, 9.8, size), 0.02),
    "narrow": (lambda rng, size: rng.beta(40, 1960, size), 0.02),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("n", [1, 30, 160])
def test_betting_bounds_cover(name: str, n: int) -> None:
    draw, mean = LAWS[name]
    rng = np.random.default_rng(4)
    b = betting.mean_bounds(draw(rng, (600, n)), 0.9)
    assert bool((b.lower <= b.mean).all() and (b.mean <= b.upper).all())
    assert within_promise(int((b.upper < mean).sum()), 600, 0.1)
    assert within_promise(int((b.lower > mean).sum()), 600, 0.1)


def test_t_bounds_fail_the_same_check() -> None:
    """Why betting: with rare large losses, most draws show none and Student's t is sure of itself."""
    draw, mean = LAWS["rare ones"]
    b = betting.mean_bounds(draw(np.random.default_rng(5), (600, 30)), 0.9)
    assert not within_promise(int((b.t_upper < mean).sum()), 600, 0.1)


def test_betting_p_value_is_valid() -> None:
    rng = np.random.default_rng(6)
    for draw, mean in LAWS.values():
        p = betting.betting_p_value(draw(rng, (800, 60)), mean)
        for level in (0.01, 0.05, 0.2):
            assert within_promise(int((p <= level).sum()), 800, level)


def test_bounds_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(7)
    x = rng.beta(1, 40, 200)
    a, b = betting.mean_bounds(x), betting.mean_bounds(np.sort(x))
    assert a.lower == pytest.approx(b.lower, abs=1e-12)
    assert a.upper == pytest.approx(b.upper, abs=1e-12)


def test_bounds_agree_with_the_test_they_invert() -> None:
    x = np.random.default_rng(8).beta(1, 60, 120)
    upper = float(betting.mean_bounds(x, 0.95).upper)
    assert betting.betting_p_value(x, upper + 1e-9) <= 0.05 < betting.betting_p_value(x, upper - 1e-9)


def test_upper_bound_at_zero_loss_is_nearly_the_exact_binomial_one() -> None:
    """Nothing lost in n prompts: no valid bound is below `1 - α^(1/n)`."""
    for n in (20, 149, 1000):
        exact = 1 - 0.05 ** (1 / n)
        upper = float(betting.mean_bounds(np.zeros(n)).upper)
        assert exact <= upper <= 1.005 * exact


def test_bounds_shrink_to_the_mean() -> None:
    rng = np.random.default_rng(9)
    x = rng.beta(3, 7, 20_000)
    b = betting.mean_bounds(x)
    assert b.upper - b.lower < 0.02
    assert b.lower < 0.3 < b.upper


def test_bounds_of_extreme_samples() -> None:
    ones, zeros = betting.mean_bounds(np.ones(50)), betting.mean_bounds(np.zeros(50))
    assert ones.upper == pytest.approx(1) and 0.9 < ones.lower < 1
    assert zeros.lower == 0 and 0 < zeros.upper < 0.1
    single = betting.mean_bounds([0.3])
    assert single.t_lower == 0 and single.t_upper == 1


# --- verdicts ---------------------------------------------------------------------------------------------


def test_verdicts() -> None:
    rng = np.random.default_rng(10)
    x = rng.beta(4, 396, 400)  # mean 0.01, standard deviation 0.005
    held = betting.decide(x, 0.02)
    assert held.verdict is Verdict.HELD and held.lower < 0.01 < held.upper <= 0.02
    assert betting.decide(x[:50], 0.02).verdict is Verdict.UNDECIDED
    violated = betting.decide(6 * x[:50], 0.02)
    assert violated.verdict is Verdict.VIOLATED and violated.lower > 0.02
    assert (held.num_prompts, held.delta, held.confidence) == (400, 0.02, 0.95)


def test_wrong_verdicts_are_rare() -> None:
    """At a mean of exactly δ "violated" is wrong; just above it "held" is. Each at most 1 - confidence."""
    rng = np.random.default_rng(11)
    verdicts = [betting.decide((rng.random(60) < 0.1).astype(float), 0.1, 0.9).verdict for _ in range(400)]
    assert within_promise(verdicts.count(Verdict.VIOLATED), 400, 0.1)
    assert within_promise(verdicts.count(Verdict.HELD), 400, 0.1)


def test_three_times_delta_is_found_with_few_prompts() -> None:
    """The sabotage of the end-to-end test: mean 3δ, spread of half the mean."""
    rng = np.random.default_rng(12)
    for _ in range(20):
        losses = rng.beta(3.7, 58, 24)
        assert betting.decide(losses, 0.02).verdict is Verdict.VIOLATED


@pytest.mark.parametrize("mean, most", [(0.005, 210), (0.008, 265), (0.010, 325), (0.012, 410)])
def test_few_prompts_are_enough_for_low_losses(mean: float, most: int) -> None:
    """Against the least that any valid test needs, and against what Hoeffding's bound would."""
    rng = np.random.default_rng(13)
    a, b = 4 * (1 - mean), 4 * (1 - mean) / mean * (1 - mean)  # spread of about half the mean
    assert beta.std(a, b) == pytest.approx(0.5 * mean, rel=0.05)
    held = (betting.mean_bounds(rng.beta(a, b, (200, most))).upper <= 0.02).mean()
    assert held >= 0.9
    least = math.log(0.9 / 0.05) / math.log((1 - mean) / 0.98)
    hoeffding = math.log(1 / 0.05) / (2 * (0.02 - mean) ** 2)
    assert least <= most < 0.2 * hoeffding


def test_prompts_to_decide() -> None:
    rng = np.random.default_rng(14)
    for mean in (0.005, 0.010, 0.05):
        sample = rng.beta(4, 4 / mean - 4, 50)
        estimate = betting.prompts_to_decide(sample, 0.02)
        assert estimate is not None
        fresh = rng.beta(4, 4 / mean - 4, (200, math.ceil(1.3 * estimate) + 2))
        bounds = betting.mean_bounds(fresh)
        decided = (bounds.upper <= 0.02) | (bounds.lower > 0.02)
        assert decided.mean() > 0.6
        half = betting.mean_bounds(fresh[:, : max(1, estimate // 2)])
        assert ((half.upper <= 0.02) | (half.lower > 0.02)).mean() < 0.6
    assert betting.prompts_to_decide([0.0], 0.02) == 149
    assert betting.prompts_to_decide([0.02], 0.02) is None

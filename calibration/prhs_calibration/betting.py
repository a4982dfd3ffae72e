"""Confidence bounds for the mean loss of held-out prompts, by betting (arXiv 2010.09686), and verdicts.

NumPy in, NumPy out. A loss is a prompt's mean dropped mass in [0, 1]; prompts are exchangeable draws of the
prompts in use. What is promised, with proofs: `docs/guarantees.md`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import t as student_t

from prhs_kernels.errors import InputError, UsageError

Array = NDArray[np.float64]


class Verdict(enum.StrEnum):
    """What the measurements say about the claim `mean loss <= delta`."""

    HELD = "held"  # the upper confidence bound is at most delta
    VIOLATED = "violated"  # the lower confidence bound is above delta
    UNDECIDED = "undecided"  # neither: more prompts are needed


# A bet is a fraction of the largest stake that keeps the capital non-negative. The capital of a fixed
# mixture of fixed bets is a martingale-type product averaged with fixed weights: valid at any sample size
# and independent of the order of the prompts.
#
# Against "mean >= m" the largest stake is the best one for losses that stay far below 1: a rare loss of 1
# that was never seen could lift the mean to m, so any valid test that succeeds with probability P needs
# log(P/α) / log((1 - mean) / (1 - m)) prompts, and the largest stake needs hardly more. It gets nearly all
# the weight; the others keep the bound useful when some loss is close to 1 and let it shrink to the mean
# with many prompts. Prompts until half / nine tenths of the draws say "held" (δ = 0.02, confidence 0.95,
# beta losses with a standard deviation of half the mean): mean 0.005: 199 / 201, 0.008: 247 / 256,
# 0.010: 297 / 307, 0.012: 371 / 392, 0.015: 592 / 641.
UPPER_BETS = np.array([1.0, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])
UPPER_WEIGHTS = np.array([0.99] + [0.01 / 8] * 8)
# Against "mean <= m" the best stake depends on the unknown spread; no single one deserves a preference.
LOWER_BETS = np.array([0.95, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])
LOWER_WEIGHTS = np.full(10, 0.1)
_BISECTIONS = 50  # interval lengths below 1e-15
_TINY = np.finfo(np.float64).tiny


def _log_capitals(losses: Array, mean: Array, upper: bool) -> Array:
    """Return the log capital of every bet against "mean >= m" (upper) or "mean <= m", `[bets, ...]`.

    `losses [..., n]`, `mean [...]` in (0, 1). Factors: `1 - c (x - m) / (1 - m)` and `1 + c (x - m) / m`.
    """
    m = mean[..., None]
    edge = (losses - m) / np.minimum(m - 1, -_TINY) if upper else (losses - m) / np.maximum(m, _TINY)
    with np.errstate(divide="ignore"):
        return np.stack([np.log(np.maximum(1 + c * edge, 0)).sum(-1) for c in _bets(upper)[0]])


def _bets(upper: bool) -> tuple[Array, Array]:
    return (UPPER_BETS, UPPER_WEIGHTS) if upper else (LOWER_BETS, LOWER_WEIGHTS)


def _log_mixture(log_capitals: Array, upper: bool) -> Array:
    log_weights = np.log(_bets(upper)[1]).reshape(-1, *[1] * (log_capitals.ndim - 1))
    return np.asarray(logsumexp(log_capitals + log_weights, axis=0))


def betting_p_value(losses: ArrayLike, mean: float) -> Array:
    """Return a p-value against "the expected loss is at least `mean`" from i.i.d. losses `[..., n]`, as
    `[...]`.

    The inverse capital of the mixture of bets, by Markov's inequality. Super-uniform for every law on [0,
    1] under the hypothesis, at every n.
    """
    x = losses_of(losses)
    against = np.full(x.shape[:-1], probability_of(mean, "mean"))
    return np.exp(np.minimum(0.0, -_log_mixture(_log_capitals(x, against, upper=True), upper=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class MeanBounds:
    """One-sided bounds on the expected loss, each at level `confidence`; arrays `[...]`."""

    mean: Array  # sample mean
    lower: Array  # betting
    upper: Array  # betting
    t_lower: Array  # Student t: approximate, too short for skewed losses
    t_upper: Array
    num_prompts: int
    confidence: float


def mean_bounds(losses: ArrayLike, confidence: float = 0.95) -> MeanBounds:
    """Return confidence bounds for the expectation of i.i.d. losses `[..., n]` in [0, 1].

    `P(lower <= E) >= confidence` and `P(E <= upper) >= confidence` for every law on [0, 1], each on its own;
    independent of the order. Raises UsageError for no prompts or a confidence outside (0, 1), InputError for
    losses outside [0, 1].
    """
    x = losses_of(losses)
    log_alpha = math.log1p(-probability_of(confidence, "confidence"))
    mean = x.mean(-1)
    n = x.shape[-1]
    half = np.full_like(mean, np.inf)
    if n > 1:
        half = student_t.ppf(confidence, n - 1) * x.std(-1, ddof=1) / math.sqrt(n)
    return MeanBounds(
        mean=mean,
        lower=_invert(x, mean, np.zeros_like(mean), log_alpha, upper=False),
        upper=_invert(x, mean, np.ones_like(mean), log_alpha, upper=True),
        t_lower=np.clip(mean - half, 0, 1),
        t_upper=np.clip(mean + half, 0, 1),
        num_prompts=n,
        confidence=confidence,
    )


def _invert(x: Array, inner: Array, outer: Array, log_alpha: float, upper: bool) -> Array:
    """Bisect for the mean whose capital is `1/α`, between the sample mean (capital <= 1) and the end of [0,
    1].

    Every bet's capital is monotone in the mean it is against, so the mixture's is. Returns the rejected side.
    """
    for _ in range(_BISECTIONS):
        middle = 0.5 * (inner + outer)
        rejected = _log_mixture(_log_capitals(x, middle, upper), upper) >= -log_alpha
        inner, outer = np.where(rejected, inner, middle), np.where(rejected, middle, outer)
    return outer


def prompts_to_decide(losses: ArrayLike, delta: float, confidence: float = 0.95) -> int | None:
    """Estimate how many prompts in all would decide `mean <= delta`, if further ones are like `losses [n]`.

    At that number the capital of an average draw reaches `1 / (1 - confidence)`: about half the draws decide
    there, most with a tenth more. A guess of the loss, `[0.01]`, serves for
    planning. None when the mean is too close to δ for a million prompts.
    """
    x = losses_of(losses)
    upper = bool(x.mean() <= delta)
    growth = _log_capitals(x.ravel(), np.asarray(probability_of(delta, "delta")), upper) / x.size
    needed = -math.log1p(-probability_of(confidence, "confidence"))
    return _first(lambda n: float(_log_mixture(n * growth, upper)) >= needed)


def _first(reached: Callable[[int], bool], limit: int = 1_000_000) -> int | None:
    """Smallest n >= 1 with `reached(n)`, for a condition that stays true; None beyond `limit`."""
    high = 1
    while not reached(high):
        high *= 2
        if high > 2 * limit:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high if high <= limit else None


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether `E loss <= delta`, with the bounds it rests on (each one-sided, at level `confidence`)."""

    verdict: Verdict
    delta: float
    confidence: float
    num_prompts: int
    mean: float
    lower: float
    upper: float
    t_lower: float  # approximate companion, decides nothing
    t_upper: float
    prompts_to_decide: int | None  # in all; None when undecided and out of reach


def decide(losses: ArrayLike, delta: float, confidence: float = 0.95) -> Decision:
    """Return the verdict on `E loss <= delta` from the losses `[n]` of held-out prompts, n >= 1.

    A wrong "held" and a wrong "violated" have probability at most `1 - confidence` each.
    """
    probability_of(delta, "delta")
    b = mean_bounds(np.ravel(np.asarray(losses, dtype=np.float64)), confidence)
    return Decision(
        verdict=verdict_of(float(b.lower), float(b.upper), delta),
        delta=delta,
        confidence=confidence,
        num_prompts=b.num_prompts,
        mean=float(b.mean),
        lower=float(b.lower),
        upper=float(b.upper),
        t_lower=float(b.t_lower),
        t_upper=float(b.t_upper),
        prompts_to_decide=prompts_to_decide(losses, delta, confidence),
    )


def verdict_of(lower: float, upper: float, delta: float) -> Verdict:
    if lower > delta:
        return Verdict.VIOLATED
    return Verdict.HELD if upper <= delta else Verdict.UNDECIDED


def probability_of(value: float, name: str, closed: bool = False) -> float:
    if not (0 < value < 1 or (closed and value == 1)):
        raise UsageError(f"{name} = {value} must lie between 0 and 1")
    return float(value)


def losses_of(losses: ArrayLike) -> Array:
    x = np.asarray(losses, dtype=np.float64)
    if x.ndim == 0 or x.size == 0:
        raise UsageError("no prompts with a loss were given; at least one is needed")
    if not bool(((x >= -1e-6) & (x <= 1 + 1e-6)).all()):  # also refuses NaN
        raise InputError(f"losses range from {x.min()} to {x.max()}; a dropped mass lies in [0, 1]")
    return np.clip(x, 0.0, 1.0)

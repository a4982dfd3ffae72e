"""The operating point, chosen so that a promise about fresh prompts holds. NumPy in, NumPy out.

By conformal risk control (arXiv 2208.02814: the promise is an average over calibration and fresh prompt) or
by learn-then-test (arXiv 2110.01052: with high probability over calibration). A loss is a prompt's mean
dropped mass in [0, 1]; prompts are exchangeable draws of the prompts in use. Proofs: `docs/guarantees.md`.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import numpy as np
from numpy.typing import ArrayLike

from prhs_calibration.betting import Array, betting_p_value, losses_of, probability_of, prompts_to_decide
from prhs_kernels.errors import InputError, UsageError


class Target(enum.StrEnum):
    """Which promise a dial point was chosen for."""

    EXPECTED = "expected"  # E loss <= delta, over the calibration draw and a fresh prompt
    HIGH_PROBABILITY = "high-probability"  # P(E[loss | calibration] <= delta) >= confidence


@dataclasses.dataclass(frozen=True)
class DialChoice:
    """An operating point and why it was chosen."""

    index: int  # of the dial point, the last one is dense
    target: Target
    delta: float
    num_prompts: int
    risk: float  # mean over prompts of the running maximum of the loss towards dense
    evidence: float  # expected: (n risk + 1) / (n + 1); high-probability: the p-value


def running_maximum(loss: ArrayLike) -> Array:
    """Return each prompt's largest loss at this dial point or a denser one; `loss [n, G]`, dense last.

    Makes a loss that is not monotone in the dial non-increasing, as conformal risk control needs.
    """
    x = losses_of(loss)
    return np.maximum.accumulate(x[..., ::-1], axis=-1)[..., ::-1]


def prompts_needed(delta: float, target: Target | str = Target.EXPECTED, confidence: float = 0.95) -> int:
    """Return the fewest calibration prompts with which `delta` can be promised at all (then at zero loss
    only).

    `⌈1/δ⌉ - 1` for the expected loss (49 at 0.02); 149 at δ = 0.02 and confidence 0.95 with high probability.
    """
    if Target(target) is Target.EXPECTED:
        n = max(1, math.ceil(1 / probability_of(delta, "delta")) - 1)
        return n if 1 / (n + 1) <= delta else n + 1  # 1/δ may have been rounded down
    needed = prompts_to_decide([0.0], delta, confidence)
    if needed is None:
        raise UsageError(f"delta = {delta} would need more than a million prompts; ask for a larger delta")
    return needed


def choose_dial(
    loss: ArrayLike, delta: float, target: Target | str = Target.EXPECTED, confidence: float = 0.95
) -> DialChoice:
    """Return the smallest dial point that keeps the promise; `loss [n, G]` per prompt, dial increasing,
    dense last.

    `expected`: smallest λ with `(n R̂(λ) + 1) / (n + 1) <= δ`, R̂ of the running maximum; then `E loss(λ̂)
    <= δ` over calibration and fresh prompt together. `high-probability`: hypotheses "risk > δ" tested from
    dense downward at level `1 - confidence`, up to the first that stands; the risk at the chosen point is
    at most δ with probability `confidence`, monotone or not. Raises UsageError when there are too few
    prompts for any promise at `delta` (saying how many are needed), InputError for a table of losses that
    cannot be used.
    """
    x = losses_of(loss)
    if x.ndim != 2:
        raise InputError(f"risk/loss has shape {x.shape}, expected [prompts, dial points]")
    n, num_points = x.shape
    target = Target(target)
    needed = prompts_needed(delta, target, confidence)
    if n < needed:
        raise UsageError(
            f"{n} calibration prompts cannot promise delta = {delta} ({target}): "
            f"at least {needed} are needed; give more prompts or a larger delta"
        )
    if x[:, -1].max() > delta:
        raise InputError(
            f"the densest dial point loses {x[:, -1].max():.3g}, more than delta = {delta}; calibrate again"
        )
    worst = running_maximum(x).mean(0)
    if target is Target.EXPECTED:
        evidence = (n * worst + 1) / (n + 1)
        index = int(np.argmax(evidence <= delta)) if evidence[-1] <= delta else num_points - 1
    else:
        evidence = betting_p_value(x.T, delta)
        index = _fixed_sequence(evidence, 1 - confidence)
    return DialChoice(index, target, delta, n, float(worst[index]), float(evidence[index]))


def _fixed_sequence(p_values: Array, alpha: float) -> int:
    """Walk down from dense, which needs no test, while "risk > δ" is rejected; return where that ends."""
    index = len(p_values) - 1
    while index > 0 and p_values[index - 1] <= alpha:
        index -= 1
    return index

"""Find the dial whose *measured* budget is a given one: selectors are compared at equal effective budget."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

TOLERANCE = 0.02  # relative; what still counts as the same budget
_AIM = 0.005  # relative; where the search stops, so that other prompts stay within the tolerance
_MAX_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Match:
    """A dial and the attended fraction measured there. `reached` is False when no dial gives the budget."""

    budget: float
    dial: float
    attended_fraction: float
    reached: bool


def match_budgets(measure: Callable[[float], float], budgets: Sequence[float], lowest: float) -> list[Match]:
    """For each budget the dial in `[lowest, 1]` at which `measure` comes closest to it.

    Args:
        measure: attended fraction at a dial; nondecreasing up to noise, 1 at the dial 1 (dense). Never called
            twice with the same dial.
        budgets: attended fractions in (0, 1].
        lowest: smallest dial that makes sense, usually the first stored one.
    """
    table = {1.0: 1.0}

    def at(dial: float) -> float:
        if dial not in table:
            table[dial] = measure(dial)
        return table[dial]

    at(lowest)
    return [_match(at, table, budget) for budget in budgets]


def _match(at: Callable[[float], float], table: dict[float, float], budget: float) -> Match:
    for step in range(_MAX_STEPS):
        dial = min(table, key=lambda known: abs(table[known] - budget))
        if abs(table[dial] / budget - 1) <= _AIM:
            break
        bracket = _bracket(table, budget)
        if bracket is None:
            break
        low, high = bracket
        share = (budget - table[low]) / (table[high] - table[low])
        if step % 3 == 2:  # interpolation alone can creep along one side of a bent curve
            share = 0.5
        at(low + (high - low) * min(max(share, 0.02), 0.98))
    dial = min(table, key=lambda known: abs(table[known] - budget))
    return Match(budget, dial, table[dial], abs(table[dial] / budget - 1) <= TOLERANCE)


def _bracket(table: dict[float, float], budget: float) -> tuple[float, float] | None:
    """Neighbouring known dials that enclose the budget; None below the lowest or when they touch."""
    dials = sorted(table)
    above = bisect.bisect_left(dials, True, key=lambda dial: table[dial] > budget)
    if above == 0 or above == len(dials) or dials[above] - dials[above - 1] < 1e-6:
        return None
    return dials[above - 1], dials[above]

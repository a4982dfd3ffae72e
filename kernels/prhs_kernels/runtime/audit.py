"""A run's own dropped mass: exact for retrievals, by a coin for the rest, with an interval for the mean.

A unit is (decode step, layer, KV head) in which something was dropped or could have been. A retrieval's mass
is known exactly. Of the other units a coin of probability p, independent of everything, picks those whose
keys are scored as well; a picked mass then stands for 1/p units.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from prhs_kernels.errors import UsageError

Verdict = Literal["held", "violated", "undecided"]

# Values of a in the exponential supermartingales exp(-a ξX + p X (1 - e^-a)) and exp(a ξX - p X (e^a - 1)),
# fixed before any mass is seen. Small ones serve long runs, large ones runs in which little was found.
GRID = tuple(2.0**k for k in range(-6, 4))


@dataclasses.dataclass(frozen=True)
class Audit:
    """Sums over the units of one run; every mass is in [0, 1].

    exact_units, exact_mass: units whose mass is known, retrievals and those that kept everything (mass 0).
    other_units: the rest, audited or not. audited_units, audited_mass: those the coin picked.
    probability: p of the coin.
    """

    exact_units: float
    exact_mass: float
    other_units: float
    audited_units: float
    audited_mass: float
    probability: float

    def __post_init__(self) -> None:
        if self.other_units and not 0 < self.probability <= 1:
            raise UsageError(f"audit probability = {self.probability} must be in (0, 1]")

    @property
    def units(self) -> float:
        return self.exact_units + self.other_units

    @property
    def estimate(self) -> float:
        """Unbiased estimate of the run's mean dropped mass; NaN without a unit."""
        if not self.units:
            return math.nan
        weighted = self.audited_mass / self.probability if self.other_units else 0.0
        return (self.exact_mass + weighted) / self.units

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bounds of the run's mean dropped mass, together right with this probability, at every step at once.

        The audited units may depend on each other and drift; only the coin has to be fair. A probability of
        1 audits everything and gives the mean itself.
        """
        if not 0 < confidence < 1:
            raise UsageError(f"confidence = {confidence} must be in (0, 1)")
        if not self.units:
            return 0.0, 1.0
        lower, upper = self.audited_mass, self.audited_mass
        if self.other_units and self.probability < 1:
            lower, upper = self._others(math.log(len(GRID) / ((1 - confidence) / 2)))
        total = self.exact_mass
        return (total + lower) / self.units, min(1.0, (total + upper) / self.units)

    def _others(self, penalty: float) -> tuple[float, float]:
        """Bounds of the mass of all other units, each wrong with probability `G e^-penalty` at most."""
        found, p = self.audited_mass, self.probability
        # what was seen is a lower bound by itself, and no unit is heavier than 1
        lower = max((a * found - penalty) / (p * math.expm1(a)) for a in GRID)
        upper = min((a * found + penalty) / (p * -math.expm1(-a)) for a in GRID)
        unseen = self.other_units - self.audited_units
        return max(lower, found), min(upper, found + unseen)

    def verdict(self, delta: float, confidence: float = 0.95) -> Verdict:
        """Whether the run's mean is at most delta, above it, or not known well enough."""
        lower, upper = self.interval(confidence)
        if lower > delta:
            return "violated"
        return "held" if upper <= delta else "undecided"

    def units_for_held(self, delta: float, confidence: float = 0.95) -> int:
        """Audited units without any mass that it would take, at least, before `held` can be said."""
        share = self.other_units / self.units if self.units else 1.0
        room = delta - (self.exact_mass / self.units if self.units else 0.0)
        if share == 0 or self.probability == 1:
            return 0
        if room <= 0:
            return -1
        penalty = math.log(len(GRID) / ((1 - confidence) / 2))
        return math.ceil(penalty * share / (room * -math.expm1(-GRID[-1])))

    def to_dict(self, delta: float | None = None, confidence: float = 0.95) -> dict[str, float | str]:
        """What a report prints."""
        lower, upper = self.interval(confidence)
        found: dict[str, float | str] = {
            "audited_dropped_mass": self.estimate,
            "audited_dropped_mass_lower": lower,
            "audited_dropped_mass_upper": upper,
            "audited_units": self.audited_units,
            "audit_probability": self.probability,
        }
        return found if delta is None else found | {"audit_verdict": self.verdict(delta, confidence)}

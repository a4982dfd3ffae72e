"""Selectors in closed loop: at which dial, on which parameters, over which tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prhs_calibration.evaluation.comparison import BASELINES, PREHOC
from prhs_calibration.evaluation.matching import Match, match_budgets
from prhs_kernels.errors import UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.scoring import PreparedScorer, Scorer, ScoringResult
from prhs_kernels.selectors.base import StepSelector
from prhs_kernels.selectors.baselines import AtBudget

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from prhs_calibration.bundle import Bundle
    from prhs_calibration.evaluation.store import Store

DENSE = "dense"
SELECTORS = (DENSE, PREHOC, *BASELINES)

Steps = tuple[list[int], int]  # tokens, and how many of them are prefilled; the rest are decode steps


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A selector at an operating point: one row of a table.

    budget: the attended fraction asked for, None for dense and where δ decides. dial: of the bundle, for
    PrHS. chooser: the method in the place of our axes.
    """

    selector: str
    params: SelectorParams
    budget: float | None = None
    delta: float | None = None
    dial: float | None = None
    chooser: StepSelector | None = None

    @property
    def name(self) -> str:
        """Unique among the points of a run."""
        asked = f"δ={self.delta:g}" if self.delta is not None else self.budget
        return self.selector if asked is None else f"{self.selector}@{asked}"


def check_selectors(selectors: Sequence[str]) -> None:
    """UsageError for a name that is not in `SELECTORS`, and for none at all."""
    unknown = [name for name in selectors if name not in SELECTORS]
    if unknown or not selectors:
        raise UsageError(f"selector {unknown[0] if unknown else ''!r}: choose from {', '.join(SELECTORS)}")


def check_budgets(budgets: Sequence[float]) -> None:
    """UsageError for a budget that is not a fraction."""
    wrong = [budget for budget in budgets if not 0 < budget < 1]
    if wrong:
        raise UsageError(f"budget {wrong[0]} must be a fraction of kv_len in (0, 1)")


def points(
    config: PreTrainedConfig,
    bundle: Bundle | None,
    selectors: Sequence[str],
    budgets: Sequence[float],
    matches: Sequence[Match],
    delta: float | None = None,
) -> list[Point]:
    """Dense first, then every asked selector at every budget.

    Args:
        bundle: needed for PrHS only; matches: its dial for each budget.
        delta: one more point for PrHS, at the dial that promises this δ.
    """
    dense = dense_params(config)
    found = [Point(DENSE, dense)]
    for name in selectors:
        if name in BASELINES:
            found += [Point(name, dense, b, chooser=AtBudget(BASELINES[name], b)) for b in budgets]
        elif name == PREHOC and bundle is not None:
            found += [Point(name, bundle.params_at(m.dial), m.budget, dial=m.dial) for m in matches]
            if delta is not None:
                index = bundle.dial_for(delta)
                dial = float(bundle.dial[index])
                found.append(Point(name, bundle.params(index), delta=delta, dial=dial))
    return found


def run_points(
    model: PreTrainedModel, steps: Steps, points: Sequence[Point]
) -> Iterator[tuple[Point, ScoringResult]]:
    """Every point over the same tokens; points that prefill alike share one prefill."""
    scorer = Scorer(model, *steps)
    groups: dict[object, list[Point]] = {}
    for point in points:
        groups.setdefault((point.params.depth, point.params.layer), []).append(point)
    for group in groups.values():
        with scorer.prepared(group[0].params) as prepared:
            for point in group:
                yield point, prepared.run(point.params, None, point.chooser)


def match_dials(
    model: PreTrainedModel,
    bundle: Bundle,
    prompts: Sequence[Steps],
    budgets: Sequence[float],
) -> list[Match]:
    """For each budget the dial whose attended fraction, in closed loop and averaged over prompts, is it.

    The first prompt finds the dials worth trying, the others are run at these; in between the fraction is
    taken as linear.
    """
    lowest = float(bundle.dial[0])
    tables: list[dict[float, float]] = []
    for steps in prompts:
        with Scorer(model, *steps).prepared(bundle.params_at(lowest)) as prepared:
            tables.append(_table(prepared, bundle, budgets, lowest, list(tables[0]) if tables else None))
    dials = sorted(tables[0])
    curve = [float(np.mean([table[dial] for table in tables])) for dial in dials]
    return match_budgets(lambda dial: float(np.interp(dial, [*dials, 1.0], [*curve, 1.0])), budgets, lowest)


def kept_matches(store: Store, name: str, find: Callable[[], list[Match]]) -> list[Match]:
    """Dials found before an interruption, or new ones, which are kept."""
    kept = store.get(name)
    if kept is None:
        kept = store.put(name, [dataclasses.asdict(match) for match in find()])
    return [Match(**match) for match in kept]


def _table(
    prepared: PreparedScorer,
    bundle: Bundle,
    budgets: Sequence[float],
    lowest: float,
    dials: list[float] | None,
) -> dict[float, float]:
    """Attended fractions of one prompt at the given dials, or at those a search for the budgets needs."""
    table: dict[float, float] = {}

    def measure(dial: float) -> float:
        params = bundle.params_at(dial)
        table[dial] = 1.0 if params.is_dense else prepared.run(params).stats.attended_fraction
        return table[dial]

    if dials is None:
        match_budgets(measure, budgets, lowest)
    else:
        for dial in dials:
            measure(dial)
    return table

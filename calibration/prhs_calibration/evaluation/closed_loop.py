"""Selectors in closed loop: at which dial, on which parameters, over which tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prhs_calibration.evaluation.comparison import LOWEST_DIAL
from prhs_calibration.evaluation.matching import Match, match_budgets
from prhs_calibration.evaluation.points import BASELINES, PREHOC, Matches, Point, searched
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.scoring import PreparedScorer, Scorer, ScoringResult
from prhs_kernels.selectors.baselines import Baseline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prhs_calibration.bundle import Bundle
    from prhs_calibration.evaluation.store import Store
    from prhs_kernels.ops.backend import Backend

Steps = tuple[list[int], int]  # tokens, and how many of them are prefilled; the rest are decode steps


def run_points(
    model: PreTrainedModel, steps: Steps, points: Sequence[Point], backend: Backend = "reference"
) -> Iterator[tuple[Point, ScoringResult]]:
    """Every point over the same tokens; points that prefill alike share one prefill.

    backend: of dense attention and PrHS; other methods run on the reference.
    """
    reads_prompt = any(point.chooser is not None and point.chooser.method.reads_prompt for point in points)
    scorer = Scorer(model, *steps, keep_queries=reads_prompt, backend=backend)
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
    backend: Backend = "reference",
) -> list[Match]:
    """For each budget the dial of PrHS whose attended fraction, in closed loop and over prompts, is it."""

    def point(dial: float) -> Point:
        return Point(PREHOC, bundle.params_at(dial), dial=dial)

    return _match(model, point, prompts, budgets, float(bundle.dial[0]), backend)


def match_baseline(
    model: PreTrainedModel, method: Baseline, prompts: Sequence[Steps], budgets: Sequence[float]
) -> list[Match]:
    """The same for a comparison method whose size does not follow from its setting."""
    dense = dense_params(model.config)

    def point(dial: float) -> Point:
        return Point(method.name, dense, dial=dial, chooser=method.at(dial))

    return _match(model, point, prompts, budgets, LOWEST_DIAL)


def _match_when_asked(
    model: PreTrainedModel,
    method: Baseline,
    prompts: Callable[[], Sequence[Steps]],
    budgets: Sequence[float],
) -> list[Match]:
    return match_baseline(model, method, prompts(), budgets)


def _match(
    model: PreTrainedModel,
    point: Callable[[float], Point],
    prompts: Sequence[Steps],
    budgets: Sequence[float],
    lowest: float,
    backend: Backend = "reference",
) -> list[Match]:
    """The first prompt finds the dials worth trying, the others are run at these.

    In between, the attended fraction is taken as linear.
    """
    first = point(lowest)
    keep_queries = first.chooser is not None and first.chooser.method.reads_prompt
    tables: list[dict[float, float]] = []
    for steps in prompts:
        scorer = Scorer(model, *steps, keep_queries=keep_queries, backend=backend)
        with scorer.prepared(first.params) as prepared:
            tables.append(_table(prepared, point, budgets, lowest, list(tables[0]) if tables else None))
    dials = sorted(tables[0])
    curve = [float(np.mean([table[dial] for table in tables])) for dial in dials]
    return match_budgets(lambda dial: float(np.interp(dial, [*dials, 1.0], [*curve, 1.0])), budgets, lowest)


def find_matches(
    model: PreTrainedModel,
    bundle: Bundle | None,
    selectors: Sequence[str],
    budgets: Sequence[float],
    prompts: Callable[[], Sequence[Steps]],
    store: Store,
    name: str,
    methods: Mapping[str, Baseline] = BASELINES,
    backend: Backend = "reference",
) -> Matches:
    """Dials of every selector that needs one, kept in `store` under `name`.

    prompts: to find them on; called only when one is not known yet.
    """
    found: dict[str, list[Match]] = {}
    if not budgets:
        return found
    if PREHOC in selectors and bundle is not None:
        found[PREHOC] = kept_matches(
            store, name, lambda: match_dials(model, bundle, prompts(), budgets, backend)
        )
    for other in searched(selectors, methods):
        found[other] = kept_matches(
            store,
            f"{name}/{other}",
            functools.partial(_match_when_asked, model, methods[other], prompts, budgets),
        )
    return found


def kept_matches(store: Store, name: str, find: Callable[[], list[Match]]) -> list[Match]:
    """Dials found before an interruption, or new ones, which are kept."""
    kept = store.get(name)
    if kept is None:
        kept = store.put(name, [dataclasses.asdict(match) for match in find()])
    return [Match(**match) for match in kept]


def _table(
    prepared: PreparedScorer,
    point: Callable[[float], Point],
    budgets: Sequence[float],
    lowest: float,
    dials: list[float] | None,
) -> dict[float, float]:
    """Attended fractions of one prompt at the given dials, or at those a search for the budgets needs."""
    table: dict[float, float] = {}

    def measure(dial: float) -> float:
        at = point(dial)
        nothing = at.chooser is None and at.params.is_dense
        table[dial] = 1.0 if nothing else prepared.run(at.params, None, at.chooser).stats.attended_fraction
        return table[dial]

    if dials is None:
        match_budgets(measure, budgets, lowest)
    else:
        for dial in dials:
            measure(dial)
    return table

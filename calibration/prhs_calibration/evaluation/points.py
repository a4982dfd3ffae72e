"""Which selectors can be compared, and at which operating points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prhs_kernels.errors import UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.selectors.baselines import (
    H2O,
    AtBudget,
    Baseline,
    DoubleSparse,
    HShare,
    Kascade,
    OracleTopK,
    Quest,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    Twilight,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from prhs_calibration.bundle import Bundle
    from prhs_calibration.evaluation.matching import Match

DENSE = "dense"
PREHOC = "prhs"
ORACLE = OracleTopK()
_METHODS: tuple[Baseline, ...] = (
    ORACLE,
    StreamingLLM(),
    Quest(),
    H2O(),
    SnapKV(),
    DoubleSparse(),
    HShare(),
    TidalDecode(),
    Kascade(),
    Twilight(),
)
BASELINES: Mapping[str, Baseline] = {method.name: method for method in _METHODS}
COMPARED = (ORACLE.name, PREHOC, *(name for name in BASELINES if name != ORACLE.name))
SELECTORS = (DENSE, *COMPARED)
DEFAULTS = (ORACLE.name, PREHOC, StreamingLLM.name, Quest.name)

Matches = Mapping[str, Sequence["Match"]]  # selector -> dial of each budget


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A selector at an operating point: one row of a table.

    budget: the attended fraction asked for, None where something else is. published: what a publication
    asks for, in words. dial: of the bundle, for PrHS, or of a method whose size is no fraction. chooser: the
    method in the place of our axes.
    """

    selector: str
    params: SelectorParams
    budget: float | None = None
    delta: float | None = None
    dial: float | None = None
    chooser: AtBudget | None = None
    published: str | None = None

    @property
    def name(self) -> str:
        """Unique among the points of a run."""
        asked = f"δ={self.delta:g}" if self.delta is not None else self.published or self.budget
        return self.selector if asked is None else f"{self.selector}@{asked}"

    @property
    def question_known(self) -> bool:
        """Publications of methods that look at the prompt have the question in it, behind the context."""
        return self.published is not None and self.chooser is not None and self.chooser.method.reads_prompt


def check_selectors(selectors: Sequence[str], among: Sequence[str] = SELECTORS) -> None:
    """UsageError for a name that is not in `among`, and for none at all."""
    unknown = [name for name in selectors if name not in among]
    if unknown or not selectors:
        raise UsageError(f"selector {unknown[0] if unknown else ''!r}: choose from {', '.join(among)}")


def check_budgets(budgets: Sequence[float]) -> None:
    """UsageError for a budget that is not a fraction."""
    wrong = [budget for budget in budgets if not 0 < budget < 1]
    if wrong:
        raise UsageError(f"budget {wrong[0]} must be a fraction of kv_len in (0, 1)")


def searched(selectors: Sequence[str], methods: Mapping[str, Baseline] = BASELINES) -> list[str]:
    """Those among `selectors` whose size is not the budget they are given: their dial has to be found."""
    return [name for name in selectors if name in methods and not methods[name].exact]


def baseline_points(
    method: Baseline,
    dense: SelectorParams,
    budgets: Sequence[float],
    matches: Sequence[Match] | None,
    published: bool,
) -> list[Point]:
    """A comparison method at every budget, and as it was published."""
    dials = list(budgets) if matches is None else [match.dial for match in matches]
    found = [
        Point(method.name, dense, budget, dial=None if matches is None else dial, chooser=method.at(dial))
        for budget, dial in zip(budgets, dials, strict=True)
    ]
    if published:
        found += [Point(method.name, dense, chooser=own, published=str(own)) for own in method.published]
    return found


def points(
    config: PreTrainedConfig,
    bundle: Bundle | None,
    selectors: Sequence[str],
    budgets: Sequence[float],
    matches: Matches,
    delta: float | None = None,
    *,
    published: bool = False,
    methods: Mapping[str, Baseline] = BASELINES,
) -> list[Point]:
    """Dense first, then every asked selector at every budget.

    Args:
        bundle: needed for PrHS only; matches: its dial for each budget, and those of `searched` methods.
        delta: one more point for PrHS, at the dial that promises this δ.
        published: one more point for each budget that a method was published with.
    """
    dense = dense_params(config)
    found = [Point(DENSE, dense)]
    for name in selectors:
        if name in methods:
            found += baseline_points(methods[name], dense, budgets, matches.get(name), published)
        elif name == PREHOC and bundle is not None:
            found += [
                Point(name, bundle.params_at(m.dial), m.budget, dial=m.dial) for m in matches.get(name, ())
            ]
            if delta is not None:
                index = bundle.dial_for(delta)
                dial = float(bundle.dial[index])
                found.append(Point(name, bundle.params(index), delta=delta, dial=dial))
    return found

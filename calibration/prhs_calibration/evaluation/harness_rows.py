"""Result rows of what lm-evaluation-harness reported, with paired intervals where a metric allows them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prhs_calibration.evaluation import rows
from prhs_calibration.evaluation.bootstrap import PairedBootstrap
from prhs_calibration.evaluation.points import DENSE, Point
from prhs_kernels.runtime.stats import DecodeStats

if TYPE_CHECKING:
    from prhs_calibration.evaluation.plan import Plan

Run = tuple[Point, DecodeStats, dict[str, Any]]  # what the harness returned for a point, and what it cost


def rows_of(name: str, runs: Sequence[Run], plan: Plan) -> Iterator[dict[str, Any]]:
    """One row per metric of the task and point; dense is the first run."""
    reported = runs[0][2]["results"][name]
    for key in reported:
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(reported[key], int | float):
            continue
        dense = _values(runs[0][2], name, key)
        if dense is not None and not len(dense):
            continue
        seed = (plan.seed, zlib.crc32(name.encode()), zlib.crc32(key.encode()))
        bootstrap = None if dense is None else PairedBootstrap(len(dense), seed=seed)
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        for point, stats, result in runs:
            row = {"task": name, "metric": label, "unit": label, "length": None}
            row["samples"] = len(result["samples"][name]) // _filters(result, name)
            row["nats_per_token"] = None
            score = float(result["results"][name][key])
            values = _values(result, name, key)
            yield (
                row
                | _scores(point, score, values, reported[key], dense, bootstrap, plan)
                | rows.costs(point, stats)
            )


def _scores(
    point: Point,
    score: float,
    values: np.ndarray | None,
    dense_score: float,
    dense: np.ndarray | None,
    bootstrap: PairedBootstrap | None,
    plan: Plan,
) -> dict[str, Any]:
    """Paired intervals where the metric is a mean over documents, else the harness's figures alone."""
    if bootstrap is None or values is None or dense is None or not np.isclose(values.mean(), score):
        bare = {"low": None, "high": None}
        change = None if point.name == DENSE else {"mean": score - dense_score} | bare
        return {"score": {"mean": score} | bare, "difference": change}
    weights = np.ones(len(values))
    bounded = all(0 <= found.min() and found.max() <= 1 for found in (values, dense))
    figures = bootstrap.sample(values, weights), bootstrap.sample(values, weights, dense)
    return rows.scores(point.name == DENSE, figures, plan.confidence, bounded)


def _values(result: dict[str, Any], name: str, key: str) -> np.ndarray | None:
    """A metric's value per document; None for metrics that are no number per document."""
    metric, _, filtered = key.partition(",")
    found = [sample.get(metric) for sample in result["samples"][name] if sample["filter"] == filtered]
    if not all(isinstance(value, int | float | np.number) for value in found):
        return None
    # RULER gives every document a metric per length, -1 where it is not of that length
    return np.array([float(value) for value in found if not (metric.isdigit() and value == -1)])


def _filters(result: dict[str, Any], name: str) -> int:
    return len({sample["filter"] for sample in result["samples"][name]}) or 1

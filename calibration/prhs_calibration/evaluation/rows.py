"""Rows of an accuracy table: score, difference from dense, and what the selector spent for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prhs_calibration.evaluation.bootstrap import PairedBootstrap, Sample, average, interval
from prhs_calibration.evaluation.matching import TOLERANCE
from prhs_calibration.evaluation.points import DENSE, PREHOC, Point
from prhs_kernels.errors import InputError
from prhs_kernels.runtime.stats import DecodeStats

Outcomes = Sequence[Mapping[str, Any]]  # per item: point name -> {correct, nats, tokens, stats, backend}
Figures = tuple[Sample, Sample]  # score, difference from dense
UNITS = {"exact": "exact match", "likelihood": "perplexity"}
COSTS = ("effective_budget", "retrieval_ratio", "attended_fraction", "kv_bytes_read")


def sums(stats: DecodeStats) -> dict[str, float]:
    """The sums of a run as plain numbers; `DecodeStats(**sums)` gives them back."""
    return {field.name: float(getattr(stats, field.name)) for field in dataclasses.fields(stats)}


def total(parts: Sequence[Mapping[str, float]]) -> DecodeStats:
    """Sums of several runs."""
    stats = DecodeStats()
    for part in parts:
        stats = stats.merged(DecodeStats(**part))  # type: ignore[arg-type]
    return stats


def costs(point: Point, stats: DecodeStats) -> dict[str, Any]:
    """What a row says of its point: who, what was asked and what was measured.

    `matched` says whether the attended fraction is the one asked for; None where none was.
    """
    measured = stats.to_dict()
    off = None if point.budget is None else abs(measured["attended_fraction"] / point.budget - 1)
    return {
        "point": point.name,
        "selector": point.selector,
        "budget": point.budget,
        "delta": point.delta,
        "dial": point.dial,
        "published": point.published,
        "matched": None if off is None else off <= TOLERANCE,
        **{name: measured[name] for name in COSTS},
    }


def check_reuse(point: Point, stats: DecodeStats, where: str) -> None:
    """InputError when PrHS never reused a set: such a run has not tested what it is about."""
    if point.selector == PREHOC and not float(stats.contested) > float(stats.retrieved):
        raise InputError(
            f"{point.name} never reused a set on {where}, so sharing was not tested; "
            "use longer prompts, another budget, or a bundle whose heads share"
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task at one length: all points on the same items."""

    task: str
    metric: str  # "exact": share of items; "likelihood": perplexity of the answers, weighted by tokens
    length: int
    bootstrap: PairedBootstrap
    confidence: float

    def rows(self, points: Sequence[Point], outcomes: Outcomes) -> Iterator[tuple[dict[str, Any], Figures]]:
        """One row per point, with the figures that its intervals come from.

        Raises:
            InputError: PrHS never reused a set.
        """
        dense = [item[DENSE] for item in outcomes]
        for point in points:
            items = [item[point.name] for item in outcomes]
            stats = total([item["stats"] for item in items])
            check_reuse(point, stats, f"{self.task} at length {self.length}")
            figures = self._figure(items), self._figure(items, dense)
            row: dict[str, Any] = {"task": self.task, "metric": self.metric, "unit": UNITS[self.metric]}
            row |= {"length": self.length, "samples": len(items), "backend": items[0]["backend"]}
            yield row | self._scores(point, figures) | _nats(items) | costs(point, stats), figures

    def _scores(self, point: Point, figures: Figures) -> dict[str, Any]:
        exact = self.metric == "exact"
        return scores(point.name == DENSE, figures, self.confidence, exact)

    def _figure(self, items: Outcomes, reference: Outcomes | None = None) -> Sample:
        values, weights = self._values(items)
        other = None if reference is None else self._values(reference)[0]
        return self.bootstrap.sample(values, weights, other, None if self.metric == "exact" else np.exp)

    def _values(self, items: Outcomes) -> tuple[np.ndarray, np.ndarray]:
        if self.metric == "exact":
            return np.array([float(item["correct"]) for item in items]), np.ones(len(items))
        tokens = np.array([float(item["tokens"]) for item in items])
        return np.array([item["nats"] for item in items]) / tokens, tokens


def scores(dense: bool, figures: Figures, confidence: float, bounded: bool) -> dict[str, Any]:
    """`score` and `difference` from dense (None for dense itself); bounded: one item counts 0 to 1."""
    score = interval(figures[0], confidence, (0.0, 1.0) if bounded else None)
    change = interval(figures[1], confidence, (-1.0, 1.0) if bounded else None)
    return {"score": score, "difference": None if dense else change}


def _nats(items: Outcomes) -> dict[str, float]:
    """Also for tasks with exact match: it still moves where the score sits at 0 or 1."""
    return {"nats_per_token": sum(item["nats"] for item in items) / sum(item["tokens"] for item in items)}


def averages(
    table: Sequence[Mapping[str, Any]], figures: Mapping[str, Figures], confidence: float
) -> list[dict[str, Any]]:
    """Mean over the tasks with exact match, for every length and point; costs are means over tasks too."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in table:
        if row["metric"] == "exact":
            groups.setdefault((row["length"], row["point"]), []).append(row)
    found = []
    for (length, point), group in groups.items():
        pairs = [figures[f"{row['task']}/{length}/{point}"] for row in group]
        mean = average([pair[0] for pair in pairs]), average([pair[1] for pair in pairs])
        first = group[0]
        found.append(
            {"length": length, "tasks": [row["task"] for row in group]}
            | {name: first[name] for name in ("point", "selector", "budget", "delta", "published")}
            | scores(point == DENSE, mean, confidence, True)
            | {name: _mean([row[name] for row in group]) for name in COSTS}
        )
    return found


def at_equal_bytes(means: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every point of PrHS beside what each other selector scores where it reads as many KV bytes.

    means: rows of `averages`. Scores of a selector are taken as linear in the bytes between its budgets; one
    that reads no point's bytes on either side is left out.
    """
    found = []
    for row in means:
        if row["selector"] != PREHOC:
            continue
        others: dict[str, float] = {}
        for name in dict.fromkeys(other["selector"] for other in means):
            line = sorted(
                (other["kv_bytes_read"], other["score"]["mean"])
                for other in means
                if other["selector"] == name and other["length"] == row["length"]
            )
            if name in (PREHOC, DENSE) or not line or not line[0][0] <= row["kv_bytes_read"] <= line[-1][0]:
                continue
            reads, values = [read for read, _ in line], [value for _, value in line]
            others[name] = float(np.interp(row["kv_bytes_read"], reads, values))
        entry = {name: row[name] for name in ("length", "point", "kv_bytes_read", "attended_fraction")}
        found.append(entry | {"score": row["score"]["mean"], "others": others})
    return found


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return float(np.mean(measured)) if measured else math.nan

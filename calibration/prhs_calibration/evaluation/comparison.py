"""Selectors x budgets on the same decode rows, at equal measured budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prhs_calibration.evaluation.matching import TOLERANCE, Match, match_budgets
from prhs_calibration.evaluation.open_loop import Replay, Sets, decode_rows, prehoc_sets
from prhs_calibration.evaluation.points import (
    BASELINES,
    COMPARED,
    DEFAULTS,
    ORACLE,
    PREHOC,
    Matches,
    Point,
    baseline_points,
    check_budgets,
    check_selectors,
    searched,
)
from prhs_calibration.evaluation.tally import OracleRows, Tally, bin_edges, summarise, summarise_lags
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.selectors.baselines import Baseline, uniform_size
from prhs_kernels.selectors.memory import Memory

if TYPE_CHECKING:
    from prhs_calibration.corpus import Prompt
    from prhs_kernels.runtime.attention import LayerObservation

BUDGETS = (1 / 16, 1 / 8, 1 / 4)
LOWEST_DIAL = 1e-3  # of methods whose dial is searched

Progress = Callable[[str, int, int], None]
PreHocSelector = Callable[["LayerObservation", SelectorParams], Sets]
Layers = list["LayerObservation"]  # of one prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare. `budgets` are attended fractions; `matching_prompts` are used to find the dials.

    published: also every comparison method at the budgets of its publication.
    """

    selectors: tuple[str, ...] = DEFAULTS
    budgets: tuple[float, ...] = BUDGETS
    matching_prompts: int = 8
    confidence: float = 0.95
    published: bool = False

    def __post_init__(self) -> None:
        check_selectors(self.selectors, COMPARED)
        check_budgets(self.budgets)
        if not self.budgets and not self.published:
            raise UsageError("no budget: give at least one fraction of kv_len in (0, 1)")
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence {self.confidence} must be in (0, 1)")


def compare(
    prompts: Sequence[Prompt],
    replay: Replay,
    params_at: Callable[[float], SelectorParams],
    lowest: float,
    settings: Settings,
    *,
    prehoc: PreHocSelector = prehoc_sets,
    methods: Mapping[str, Baseline] = BASELINES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All selectors at all budgets on `prompts`.

    Args:
        replay: shows the decode rows of the dense model on a prompt, layer by layer.
        params_at: pre-hoc parameters at a dial; lowest: the smallest dial that they are stored for.
        prehoc: sets of one layer under such parameters. methods: comparison methods, fitted.

    Returns:
        JSON-able: `cells` (selector x budget), `published` (selector x published budget), `matching` (dials
        of PrHS and measured budgets), `dials` (those of other methods), `edges`, conditions.
    """
    if not prompts:
        raise InputError("no prompts to analyze: ask for at least one")
    dense = params_at(1.0)
    with torch.inference_mode():
        matches = _matches(prompts, replay, params_at, lowest, settings, prehoc, methods, progress)
        points: list[Point] = []
        for name in settings.selectors:
            if name == PREHOC:
                points += [Point(name, params_at(m.dial), m.budget, dial=m.dial) for m in matches[name]]
            else:
                points += baseline_points(
                    methods[name], dense, settings.budgets, matches.get(name), settings.published
                )
        cells = _Cells(points, dense, max(len(prompt.input_ids) for prompt in prompts), prehoc)
        for done, prompt in enumerate(prompts):
            cells.start_prompt()
            replay(prompt, cells.observe)
            if progress is not None:
                progress("comparing selectors", done + 1, len(prompts))
    return _report(prompts, cells, matches, settings)


def _matches(
    prompts: Sequence[Prompt],
    replay: Replay,
    params_at: Callable[[float], SelectorParams],
    lowest: float,
    settings: Settings,
    prehoc: PreHocSelector,
    methods: Mapping[str, Baseline],
    progress: Progress | None,
) -> Matches:
    """Dials of every selector whose budget does not follow from its setting."""
    others = searched(settings.selectors, methods)
    found: dict[str, list[Match]] = {}
    if not others and PREHOC not in settings.selectors:
        return found
    stored = _choosing_rows(prompts[: settings.matching_prompts], replay, bool(others), progress)
    if PREHOC in settings.selectors:
        found[PREHOC] = match_budgets(
            lambda dial: _attended_fraction(stored, lambda one, _: prehoc(one, params_at(dial)).kept),
            settings.budgets,
            lowest,
        )
    for name in others:
        found[name] = match_budgets(_spends(methods[name], stored), settings.budgets, LOWEST_DIAL)
    return found


def _spends(method: Baseline, stored: Sequence[Layers]) -> Callable[[float], float]:
    """Attended fraction of a method by its dial."""

    def kept(dial: float) -> Callable[[LayerObservation, Memory], torch.Tensor]:
        return lambda one, memory: method.at(dial).choose(decode_rows(one, memory)).kept

    return lambda dial: 1.0 if dial >= 1 else _attended_fraction(stored, kept(dial))


def _choosing_rows(
    prompts: Sequence[Prompt], replay: Replay, with_prompts: bool, progress: Progress | None
) -> list[Layers]:
    """Decode rows of a few prompts without what is largest and chooses nothing: probabilities and values."""
    stored: list[Layers] = []

    def store(seen: LayerObservation) -> None:
        nothing = seen.positions[:0]
        no_probs = seen.dense_probs.new_zeros(1).expand(seen.dense_probs.shape)
        stored[-1].append(
            dataclasses.replace(
                seen,
                dense_probs=no_probs,
                sparse_probs=nothing,
                values=nothing,
                kept=nothing,
                prompts=seen.prompts if with_prompts else {},
            )
        )

    for done, prompt in enumerate(prompts):
        stored.append([])
        replay(prompt, store)
        if progress is not None:
            progress("matching budgets", done + 1, len(prompts))
    return stored


def _attended_fraction(
    stored: Sequence[Layers], kept: Callable[[LayerObservation, Memory], torch.Tensor]
) -> float:
    parts = []
    for layers in stored:
        memory = Memory(layers[0].prompts)
        parts += [(kept(one, memory).sum(-1).double() / one.visible.sum(-1)).mean() for one in layers]
    return float(torch.stack(parts).mean())


class _Cells:
    """Tallies of every point; `observe` takes the layers of the current prompt."""

    def __init__(
        self, points: Sequence[Point], shape: SelectorParams, context_length: int, prehoc: PreHocSelector
    ) -> None:
        self.points, self.prehoc = points, prehoc
        self.context_length, self.shape = context_length, shape
        self.num_steps = 0
        self.tallies: dict[str, list[Tally]] = {point.name: [] for point in points}
        self.memories: dict[str, Memory] = {}

    def start_prompt(self) -> None:
        self.memories = {point.name: Memory() for point in self.points}
        for prompts in self.tallies.values():
            prompts.append(Tally(self.shape.num_layers, self.shape.num_qo_heads, self.context_length))

    def observe(self, seen: LayerObservation) -> None:
        rows = decode_rows(seen)
        oracle = OracleRows(rows, ORACLE.rank(rows))
        self.num_steps += rows.dense_probs.shape[1] if seen.layer == 0 else 0
        uniform: dict[float, float] = {}
        for point in self.points:
            budget = point.budget
            if budget is not None and budget not in uniform:
                uniform[budget] = float(oracle.dropped(oracle.kept(uniform_size(rows, budget))).mean())
            sets = self._sets(point, seen)
            tally = self.tallies[point.name][-1]
            tally.add(seen.layer, oracle, sets, None if budget is None else uniform[budget])
            if point.selector == PREHOC:
                tally.add_lags(sets)

    def _sets(self, point: Point, seen: LayerObservation) -> Sets:
        if point.chooser is None:
            return self.prehoc(seen, point.params)
        memory = self.memories[point.name]
        memory.prompts = seen.prompts
        return point.chooser.choose(decode_rows(seen, memory))


def _report(prompts: Sequence[Prompt], cells: _Cells, matches: Matches, settings: Settings) -> dict[str, Any]:
    return {
        "loop": "open",
        "note": "dense model, teacher forced; the layer axis (ETF) has no effect in an open loop",
        "interval": f"Student t over prompts, {settings.confidence:g}",
        "confidence": settings.confidence,
        "selectors": list(settings.selectors),
        "budgets": list(settings.budgets),
        "num_prompts": len(prompts),
        "num_steps": cells.num_steps,
        "num_layers": cells.shape.num_layers,
        "num_qo_heads": cells.shape.num_qo_heads,
        "num_kv_heads": cells.shape.num_kv_heads,
        "prompts": [prompt.text_hash for prompt in prompts],
        "edges": bin_edges(cells.context_length),
        "matching": [dataclasses.asdict(match) for match in matches.get(PREHOC, ())],
        "dials": {
            name: [dataclasses.asdict(match) for match in of_method]
            for name, of_method in matches.items()
            if name != PREHOC
        },
        "cells": [
            _cell(point, cells.tallies[point.name], settings)
            for point in cells.points
            if point.published is None
        ],
        "published": [
            _cell(point, cells.tallies[point.name], settings)
            for point in cells.points
            if point.published is not None
        ],
    }


def _cell(point: Point, tallies: list[Tally], settings: Settings) -> dict[str, Any]:
    cell: dict[str, Any] = {"selector": point.selector, "budget": point.budget, "published": point.published}
    cell |= summarise(tallies, settings.confidence)
    # equal budgets are a condition of the comparison: say for every row whether it was met
    off = None if point.budget is None else abs(cell["attended_fraction"] / point.budget - 1)
    cell |= {"matched": None if off is None else off <= TOLERANCE, "dial": point.dial}
    if point.selector != PREHOC:
        return cell | {"allocation": "uniform"}
    return cell | {"allocation": "calibrated", "by_steps_since_retrieval": summarise_lags(tallies)}

"""Selectors x budgets on the same decode rows, at equal measured budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prhs_calibration.evaluation.matching import TOLERANCE, Match, match_budgets
from prhs_calibration.evaluation.open_loop import PreHocSets, Replay, decode_rows, prehoc_sets
from prhs_calibration.evaluation.tally import OracleRows, Tally, bin_edges, summarise, summarise_lags
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.selectors.baselines import Baseline, OracleTopK, Quest, StreamingLLM, uniform_size

if TYPE_CHECKING:
    from prhs_calibration.corpus import Prompt
    from prhs_kernels.runtime.attention import LayerObservation

BUDGETS = (1 / 16, 1 / 8, 1 / 4)
PREHOC = "prhs"
ORACLE = OracleTopK()
BASELINES: Mapping[str, Baseline] = {method.name: method for method in (ORACLE, StreamingLLM(), Quest())}
SELECTORS = (ORACLE.name, PREHOC, *(name for name in BASELINES if name != ORACLE.name))

Progress = Callable[[str, int, int], None]
PreHocSelector = Callable[["LayerObservation", SelectorParams], PreHocSets]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare. `budgets` are attended fractions; `matching_prompts` are used to find the dials."""

    selectors: tuple[str, ...] = SELECTORS
    budgets: tuple[float, ...] = BUDGETS
    matching_prompts: int = 8
    confidence: float = 0.95

    def __post_init__(self) -> None:
        unknown = [name for name in self.selectors if name not in SELECTORS]
        if unknown or not self.selectors:
            raise UsageError(
                f"selector {unknown[0] if unknown else ''!r}: choose from {', '.join(SELECTORS)}"
            )
        wrong = [budget for budget in self.budgets if not 0 < budget < 1]
        if wrong or not self.budgets:
            raise UsageError(f"budget {wrong[0] if wrong else '()'} must be a fraction of kv_len in (0, 1)")
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All selectors at all budgets on `prompts`.

    Args:
        replay: shows the decode rows of the dense model on a prompt, layer by layer.
        params_at: pre-hoc parameters at a dial; lowest: the smallest dial that they are stored for.
        prehoc: sets of one layer under such parameters.

    Returns:
        JSON-able: `cells` (selector x budget), `matching` (dials and measured budgets), `edges`, conditions.
    """
    if not prompts:
        raise InputError("no prompts to analyze: ask for at least one")
    shape = params_at(1.0)
    with torch.inference_mode():
        matches: list[Match] = []
        if PREHOC in settings.selectors:
            layers = _choosing_rows(prompts[: settings.matching_prompts], replay, progress)
            matches = match_budgets(
                lambda dial: _attended_fraction(layers, params_at(dial), prehoc), settings.budgets, lowest
            )
            del layers
        cells = _Cells(settings, shape, max(len(prompt.input_ids) for prompt in prompts), prehoc)
        cells.dials = [params_at(match.dial) for match in matches]
        for done, prompt in enumerate(prompts):
            cells.start_prompt()
            replay(prompt, cells.observe)
            if progress is not None:
                progress("comparing selectors", done + 1, len(prompts))
    return _report(prompts, cells, matches, settings)


def _choosing_rows(
    prompts: Sequence[Prompt], replay: Replay, progress: Progress | None
) -> list[LayerObservation]:
    """Decode rows of a few prompts without what is largest and chooses nothing: probabilities and values."""
    layers: list[LayerObservation] = []

    def store(seen: LayerObservation) -> None:
        nothing = seen.positions[:0]
        layers.append(
            dataclasses.replace(seen, dense_probs=nothing, sparse_probs=nothing, values=nothing, kept=nothing)
        )

    for done, prompt in enumerate(prompts):
        replay(prompt, store)
        if progress is not None:
            progress("matching budgets", done + 1, len(prompts))
    return layers


def _attended_fraction(
    layers: Sequence[LayerObservation], params: SelectorParams, prehoc: PreHocSelector
) -> float:
    parts = [prehoc(layer, params).kept.sum(-1).double() / layer.visible.sum(-1) for layer in layers]
    return float(torch.stack([part.mean() for part in parts]).mean())


class _Cells:
    """Tallies of every selector x budget; `observe` takes the layers of the current prompt."""

    def __init__(
        self, settings: Settings, shape: SelectorParams, context_length: int, prehoc: PreHocSelector
    ) -> None:
        self.settings, self.prehoc = settings, prehoc
        self.dials: list[SelectorParams] = []
        self.context_length, self.shape = context_length, shape
        self.num_steps = 0
        self.tallies: dict[tuple[str, int], list[Tally]] = {
            (name, index): [] for name in settings.selectors for index in range(len(settings.budgets))
        }

    def start_prompt(self) -> None:
        for prompts in self.tallies.values():
            prompts.append(Tally(self.shape.num_layers, self.shape.num_qo_heads, self.context_length))

    def observe(self, seen: LayerObservation) -> None:
        rows = decode_rows(seen)
        oracle = OracleRows(rows, ORACLE.rank(rows))
        self.num_steps += rows.dense_probs.shape[1] if seen.layer == 0 else 0
        for index, budget in enumerate(self.settings.budgets):
            size = uniform_size(rows, budget)
            uniform = float(oracle.dropped(oracle.kept(size)).mean())
            for name in self.settings.selectors:
                tally = self.tallies[name, index][-1]
                if name == PREHOC:
                    sets = self.prehoc(seen, self.dials[index])
                    tally.add(seen.layer, oracle, sets.kept, uniform, sets.rows_read)
                    tally.add_prehoc(sets)
                    continue
                method = BASELINES[name]
                kept = oracle.kept(size) if name == ORACLE.name else method.select(rows, size)
                tally.add(seen.layer, oracle, kept, uniform, method.rows_read(rows, kept))


def _report(
    prompts: Sequence[Prompt], cells: _Cells, matches: Sequence[Match], settings: Settings
) -> dict[str, Any]:
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
        "matching": [dataclasses.asdict(match) for match in matches],
        "cells": [
            _cell(name, index, tallies, matches, settings) for (name, index), tallies in cells.tallies.items()
        ],
    }


def _cell(
    name: str, index: int, tallies: list[Tally], matches: Sequence[Match], settings: Settings
) -> dict[str, Any]:
    budget = settings.budgets[index]
    cell: dict[str, Any] = {"selector": name, "budget": budget} | summarise(tallies, settings.confidence)
    # equal budgets are a condition of the comparison: say for every row whether it was met
    cell["matched"] = abs(cell["attended_fraction"] / budget - 1) <= TOLERANCE
    if name != PREHOC:
        constant = BASELINES[name].retrieval_ratio
        return cell | {"allocation": "uniform", "dial": None, "retrieval_ratio": constant}
    retrieved, contested = (sum(tally.counts[key] for tally in tallies) for key in ("retrieved", "contested"))
    ratio = retrieved / contested if contested else None
    lags = {"by_steps_since_retrieval": summarise_lags(tallies)}
    return cell | {"allocation": "calibrated", "dial": matches[index].dial, "retrieval_ratio": ratio} | lags

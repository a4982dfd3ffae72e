"""What ranking by a low-bit copy of the keys costs: the share of the exact top-k found, and the mass lost.

Measured on the rows of the fit split, retrieving at every sampled step; the mass is that of exact keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from prhs_calibration.statistics import BUDGET_RATIOS, budget_sizes
from prhs_kernels.ops.retrieve import reference as retrieve
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.selectors.cis import scan_scores

AUTO = "auto"
# fp8 codes are as large as int8 ones and their scan is slower than an exact one: only when asked for by name
AUTO_KINDS = (KeyCopyKind.EXACT, KeyCopyKind.INT8, KeyCopyKind.INT4)
SAMPLE_EVERY = 4  # decode steps


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """One way to scan, as the fit prices it.

    row: what a position costs, `SelectorParams.scan_row`. extra: `[ratios, L, H]`, mass dropped beyond what
    an exact scan drops. recall: `[ratios]`, share of the exact top-k that it finds, NaN where k was always 0.
    """

    kind: KeyCopyKind
    row: float
    extra: np.ndarray
    recall: np.ndarray

    @property
    def mean_recall(self) -> float:
        """Over the budgets that leave a choice."""
        return float(np.nanmean(self.recall[:-1]))


class KeyCopyStatistics:
    """Sums over the rows of many prompts, for each of `kinds`; `scans` after the last prompt."""

    def __init__(self, params: SelectorParams, kinds: Sequence[KeyCopyKind]) -> None:
        self.params, self.kinds, self.steps = params, tuple(kinds), 0
        self._lost = np.zeros((len(kinds), len(BUDGET_RATIOS), params.num_layers, params.num_kv_heads))
        self._found, self._wanted = np.zeros((2, len(kinds), len(BUDGET_RATIOS)))

    def add(self, rows: LayerObservation) -> None:
        """Add one layer of one prompt."""
        steps = torch.arange(0, len(rows.positions), SAMPLE_EVERY, device=rows.positions.device)
        allowed, query = rows.kept[0, steps], rows.query[:, :, steps]
        keys = torch.arange(allowed.shape[-1], device=allowed.device)
        local = keys > rows.positions[steps, None] - self.params.num_local
        middle = allowed & (keys >= self.params.num_sinks) & ~local
        exact = scan_scores(query, rows.keys, rows.scale, KeyCopyKind.EXACT)[0].transpose(1, 2)
        mass = rows.dense_probs[:, steps].view(len(exact), -1, *middle.shape).mean(dim=1)
        sizes = budget_sizes(rows.visible[steps].sum(-1), middle.sum(-1))
        best = _ranks(exact, allowed, middle)
        for index, kind in enumerate(self.kinds):
            if kind == KeyCopyKind.EXACT:
                continue
            copied = scan_scores(query, rows.keys, rows.scale, kind)[0].transpose(1, 2)
            ranks = _ranks(copied, allowed, middle)
            for place in range(len(BUDGET_RATIOS)):
                size = sizes[:, place, None]
                wanted, found = (best >= 0) & (best < size), (ranks >= 0) & (ranks < size)
                lost = (mass * wanted).sum(-1) - (mass * found).sum(-1)
                self._lost[index, place, rows.layer] += lost.double().sum(-1).cpu().numpy()
                self._found[index, place] += int((wanted & found).sum())
                self._wanted[index, place] += int(wanted.sum())
        self.steps += len(steps) if rows.layer == 0 else 0

    def scans(self) -> list[Scan]:
        """One per kind; the exact scan loses nothing and finds all."""
        found = []
        for index, kind in enumerate(self.kinds):
            row = dataclasses.replace(self.params, key_copy=kind).scan_row
            with np.errstate(invalid="ignore"):
                recall = self._found[index] / self._wanted[index]
            if kind == KeyCopyKind.EXACT:
                recall = np.ones(len(BUDGET_RATIOS))
            found.append(Scan(kind, row, self._lost[index] / max(self.steps, 1), recall))
        return found


def _ranks(scores: torch.Tensor, allowed: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """Rank of every middle position, -1 elsewhere: `[H, steps, n]` from scores `[H, steps, group, n]`."""
    weights = retrieve.importance(scores, allowed)
    available = middle.sum(-1).expand(weights.shape[:-1])
    return retrieve.top_positions(weights, middle.expand(weights.shape), available)


def kinds_to_compare(asked: str) -> tuple[KeyCopyKind, ...]:
    """Kinds of key copy that calibration compares for `--key-copy asked`."""
    return AUTO_KINDS if asked == AUTO else (KeyCopyKind(asked),)

"""Sums of what a selector missed on one prompt, and their summary over prompts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.stats
import torch

from prhs_calibration.evaluation.open_loop import Sets, steps_since_retrieval
from prhs_kernels.selectors.baselines import DecodeRows

POSITION_BINS = 20  # equal parts of position / kv_len
MAX_LAG = 16  # decode steps since the last retrieval; the last bin holds everything later
SCALARS = ("dropped_mass", "oracle_dropped_mass", "uniform_oracle_dropped_mass", "excess", "miss_rate")


@dataclasses.dataclass(frozen=True, eq=False)
class OracleRows:
    """A layer's decode rows with the oracle's order of their positions, sorted once for every size."""

    rows: DecodeRows
    rank: torch.Tensor  # [num_kv_heads, steps, n] int64, OracleTopK.rank

    def kept(self, size: torch.Tensor) -> torch.Tensor:
        """The oracle's set of `size [num_kv_heads, steps]` positions, `[num_kv_heads, steps, n]` bool."""
        return (self.rank < size[..., None]) & self.rows.visible

    def dropped(self, kept: torch.Tensor) -> torch.Tensor:
        """Dense probability outside `kept`, group mean, `[num_kv_heads, steps]` float32."""
        return (self.rows.group_mass * ~kept).sum(-1)


class Tally:
    """What one selector at one budget did on one prompt; layers are added one by one.

    Every (step, layer, KV head) has the same weight; a row's mass is the mean over the group's query heads,
    so means equal those over query heads.
    """

    def __init__(self, num_layers: int, num_qo_heads: int, context_length: int) -> None:
        self.scalars = {name: np.zeros(num_layers) for name in SCALARS}
        self.head_dropped = np.zeros((num_layers, num_qo_heads))
        self.counts = dict.fromkeys(
            ("units", "kept", "fraction", "rows", "dense", "retrieved", "contested"), 0.0
        )
        bins = {"position": POSITION_BINS, "distance": num_distance_bins(context_length)}
        self.where = {axis: np.zeros((3, size)) for axis, size in bins.items()}  # missed, oracle mass; misses
        self.lag = np.zeros((3, MAX_LAG + 1))  # rows, excess, miss rate

    def add(
        self,
        layer: int,
        oracle: OracleRows,
        sets: Sets,
        uniform_dropped: float | None,
    ) -> None:
        """Record one layer.

        uniform_dropped: mean dropped mass of the oracle with the same size everywhere, at this budget; None
        where no budget was asked for, then that of the oracle at this selector's own sizes.
        """
        rows, kept = oracle.rows, sets.kept
        size = kept.sum(-1)
        best = oracle.kept(size)
        dropped, best_dropped = oracle.dropped(kept), oracle.dropped(best)
        missed = best & ~kept
        miss_rate = missed.sum(-1) / size.clamp(min=1)
        self._excess, self._miss_rate = dropped - best_dropped, miss_rate
        row = {
            "dropped_mass": dropped,
            "oracle_dropped_mass": best_dropped,
            "excess": self._excess,
            "miss_rate": miss_rate,
        }
        for name, values in row.items():
            self.scalars[name][layer] = float(values.mean())
        self.scalars["uniform_oracle_dropped_mass"][layer] = (
            float(best_dropped.mean()) if uniform_dropped is None else uniform_dropped
        )
        per_head = torch.einsum("hgdn,hdn->hg", rows.by_group(rows.dense_probs), (~kept).float())
        self.head_dropped[layer] = per_head.flatten().cpu().numpy() / kept.shape[1]
        self._count(rows, size, sets)
        self._locate(rows, missed, best)

    def add_lags(self, sets: Sets) -> None:
        """Record when the set of the layer just added was retrieved."""
        lag = steps_since_retrieval(sets.retrieved)
        chosen = (lag >= 0) & sets.contested
        index = lag[chosen].clamp(max=MAX_LAG).cpu()
        for row, weights in enumerate((torch.ones_like(self._excess), self._excess, self._miss_rate)):
            weight = weights[chosen].double().cpu()
            self.lag[row] += torch.bincount(index, weight, minlength=MAX_LAG + 1).numpy()

    def _count(self, rows: DecodeRows, size: torch.Tensor, sets: Sets) -> None:
        seen = rows.num_visible.double()
        self.counts["units"] += size.numel()
        self.counts["kept"] += float(size.sum())
        self.counts["fraction"] += float((size / seen).sum())
        self.counts["rows"] += float(sets.rows_read.sum())
        self.counts["retrieved"] += float(sets.retrieved.sum())
        self.counts["contested"] += float(sets.contested.sum())
        self.counts["dense"] += 2 * float(seen.sum()) * rows.num_kv_heads

    def _locate(self, rows: DecodeRows, missed: torch.Tensor, best: torch.Tensor) -> None:
        key = torch.arange(missed.shape[-1], device=missed.device)
        t = rows.positions[:, None]
        relative = (key * POSITION_BINS // (t + 1)).clamp(max=POSITION_BINS - 1)
        masses = (rows.group_mass * missed, rows.group_mass * best, missed)
        totals = [values.sum(0, dtype=torch.float64).flatten() for values in masses]
        for axis, index in (("position", relative), ("distance", distance_bin(t - key))):
            size = self.where[axis].shape[1]
            for row, weights in enumerate(totals):
                counted = torch.bincount(index.flatten(), weights, minlength=size)
                self.where[axis][row] += counted[:size].cpu().numpy()


def num_distance_bins(context_length: int) -> int:
    """Bins for distances 0, 1, 2-3, 4-7, ... up to `context_length`."""
    return 1 + max(context_length - 1, 0).bit_length()


def distance_bin(distance: torch.Tensor) -> torch.Tensor:
    """Bin of a distance in positions: 0 for 0, else 1 + floor(log2 d). Negative distances count as 0."""
    return torch.frexp(distance.clamp(min=0).double()).exponent.long()


def bin_edges(context_length: int) -> dict[str, list[float]]:
    """Edges of the bins: `by_position` in fractions of kv_len, `by_distance` in positions from the query."""
    powers = [float(2**power) for power in range(num_distance_bins(context_length))]
    return {
        "position": [edge / POSITION_BINS for edge in range(POSITION_BINS + 1)],
        "distance": [0.0, *powers],
    }


def interval(values: np.ndarray[Any, Any], confidence: float) -> dict[str, Any]:
    """Mean over axis 0 (prompts) with a two-sided Student t interval; no bounds with a single prompt."""
    mean = values.mean(0)
    count = values.shape[0]
    if count < 2:
        return {"mean": mean.tolist(), "low": None, "high": None}
    spread = values.std(0, ddof=1) / math.sqrt(count)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, count - 1)) * spread
    return {"mean": mean.tolist(), "low": (mean - half).tolist(), "high": (mean + half).tolist()}


def summarise(tallies: list[Tally], confidence: float) -> dict[str, Any]:
    """One selector at one budget over all prompts: figures with intervals, JSON-able."""
    result: dict[str, Any] = {}
    for name in SCALARS:
        result[name] = interval(np.array([tally.scalars[name].mean() for tally in tallies]), confidence)
    counts = {name: np.array([tally.counts[name] for tally in tallies]) for name in tallies[0].counts}
    result["attended_fraction"] = float((counts["fraction"] / counts["units"]).mean())
    result["effective_budget"] = float((counts["kept"] / counts["units"]).mean())
    result["kv_bytes_read"] = float((counts["rows"] / counts["dense"]).mean())
    contested = float(counts["contested"].sum())
    result["retrieval_ratio"] = float(counts["retrieved"].sum()) / contested if contested else None
    heads = np.mean([tally.head_dropped for tally in tallies], axis=0)
    worst = np.unravel_index(int(heads.argmax()), heads.shape)
    result["worst_head"] = {
        "layer": int(worst[0]),
        "qo_head": int(worst[1]),
        "dropped_mass": float(heads[worst]),
    }
    result["by_layer"] = {
        name: interval(np.array([tally.scalars[name] for tally in tallies]), confidence)
        for name in ("dropped_mass", "oracle_dropped_mass", "excess", "miss_rate")
    }
    for axis in ("position", "distance"):
        result[f"by_{axis}"] = _located(
            [(tally.where[axis], tally.counts["units"]) for tally in tallies], confidence
        )
    return result


def _located(tables: list[tuple[np.ndarray[Any, Any], float]], confidence: float) -> dict[str, Any]:
    """Missed and oracle mass and missed positions per unit and bin: sums over bins are the means per unit."""
    missed, oracle = (np.array([table[row] / units for table, units in tables]) for row in (0, 1))
    return {
        "missed_mass": interval(missed, confidence),
        "oracle_mass": interval(oracle, confidence),
        "misses": (sum(table[2] for table, _ in tables) / sum(units for _, units in tables)).tolist(),
    }


def summarise_lags(tallies: list[Tally]) -> dict[str, list[float | None]]:
    """Excess and miss rate by steps since the last retrieval, pooled over prompts; None without units."""
    total = sum((tally.lag for tally in tallies), np.zeros((3, MAX_LAG + 1)))
    units = [float(value) for value in total[0]]

    def mean(sums: np.ndarray[Any, Any]) -> list[float | None]:
        return [float(value) / count if count else None for value, count in zip(sums, units, strict=True)]

    return {"units": list(units), "excess": mean(total[1]), "miss_rate": mean(total[2])}

"""Statistics -> schedules: the paper's depth and layer curves by least squares, budgets per head by the price
of loss.

Everything here looks at the fit split only; choosing λ on another split is `risk.py`'s business.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import curve_fit

from prhs_calibration.key_copies import Scan
from prhs_calibration.statistics import BUDGET_RATIOS, FRACTIONS, GateSetting, TimeStatistics

USUAL_DELTAS = (0.3, 0.2, 0.1, 0.05, 0.03)
NEAR = np.array([0.75, 0.84, 0.92, 0.97, 1.02])  # of the admitted loss: open and closed loop differ a little
MARGIN = 0.93
TAIL_WEIGHT = 0.5  # of the worst steps in the price of a loss; the mean has the rest
MIN_FRACTION = 0.02  # a schedule that drops less than this, averaged over layers, is not worth having


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A fitted schedule `1 - base ** ((l - start_layer) / (L - start_layer))`; the exponent stays 1.

    target: `[L]`, the largest fraction each layer tolerates; misfit: largest absolute difference to the curve
    from `start_layer` on. Only `base ** power` is identified, so the power is fixed at 1.
    """

    start_layer: int
    base: float
    target: np.ndarray
    misfit: float

    def fractions(self, num_layers: int) -> np.ndarray:
        """The curve, `[L]`, 0 below `start_layer`."""
        return curve(np.arange(num_layers), self.start_layer, num_layers, self.base)

    def pays(self, num_layers: int) -> bool:
        """Whether the curve drops enough, over all layers, to be worth its share of the loss."""
        return bool(self.fractions(num_layers).mean() >= MIN_FRACTION)

    def weakened(self, factor: float) -> Schedule:
        """The same curve with its exponent scaled by `factor` in (0, 1): every fraction shrinks."""
        return dataclasses.replace(self, base=self.base**factor)


def curve(layers: np.ndarray, start_layer: int, num_layers: int, base: float | np.ndarray) -> np.ndarray:
    """The paper's schedule over layers, `[len(layers)]`."""
    depth = np.clip((layers - start_layer) / (num_layers - start_layer), 0.0, None)
    return np.asarray(1.0 - base**depth)


def tolerated_fractions(loss: np.ndarray, tolerance: float) -> np.ndarray:
    """Largest fraction per layer whose loss stays within `tolerance`, interpolated: `[L]` from `[L,
    fractions]`."""
    running = np.maximum.accumulate(
        loss, axis=1
    )  # measured losses may wiggle; a schedule must not rely on a dip
    return np.array([_crossing(row, tolerance) for row in running])


def _crossing(row: np.ndarray, tolerance: float) -> float:
    over = np.flatnonzero(row > tolerance)
    if over.size == 0:
        return FRACTIONS[-1]
    first = int(over[0])
    if first == 0:
        return 0.0
    low, high = row[first - 1], row[first]
    share = (tolerance - low) / (high - low)
    return FRACTIONS[first - 1] + share * (FRACTIONS[first] - FRACTIONS[first - 1])


def fit_schedule(loss: np.ndarray, tolerance: float, first_layer: int = 1) -> Schedule | None:
    """Fit the schedule whose mean loss over all layers stays within `tolerance`; None when it drops next to
    nothing.

    Args:
        loss: `[L, fractions]`, mean loss of one layer alone at each of `FRACTIONS`.
        first_layer: the lowest `start_layer` to try; layer 0 has no layer below.

    The paper's curve rises with depth; layers do not have to. For every start layer the curve is fitted to
    the tolerated fractions of the layers above it, then weakened until the loss it would cost is within the
    tolerance, and the start layer that drops most is kept.
    """
    num_layers = loss.shape[0]
    target = tolerated_fractions(loss, tolerance * num_layers / max(num_layers - first_layer, 1))
    best: Schedule | None = None
    for start in range(first_layer, num_layers - 1):
        layers = np.arange(start, num_layers)
        # the curve is 0 at the start layer itself, so there must be at least one above it
        (log_base,), _ = curve_fit(
            lambda x, k, start=start: curve(x, start, num_layers, np.exp(-k)),
            layers,
            target[start:],
            p0=[0.5],
            bounds=(1e-6, 20.0),
        )
        misfit = float(np.abs(curve(layers, start, num_layers, np.exp(-log_base)) - target[start:]).max())
        schedule = Schedule(start, float(np.exp(-log_base)), target, misfit)
        while predicted_loss(schedule, loss) > tolerance and schedule.base < 1 - 1e-6:
            schedule = schedule.weakened(0.9)
        gain = schedule.fractions(num_layers).sum()
        if gain > (0.0 if best is None else best.fractions(num_layers).sum()):
            best = schedule
    return best if best is not None and best.pays(num_layers) else None


def predicted_loss(schedule: Schedule, loss: np.ndarray) -> float:
    """Mean loss over layers that a schedule costs, each layer taken alone, interpolated in the fraction."""
    fractions = schedule.fractions(loss.shape[0])
    return float(np.mean([np.interp(f, FRACTIONS, row) for f, row in zip(fractions, loss, strict=True)]))


@dataclasses.dataclass(frozen=True)
class Dial:
    """The family of budgets along λ with one gate setting per head.

    lam: `[G]` increasing, mean budget ratio, the last is 1 (dense); budget_ratio: `[G, L, H]` nondecreasing
    in G.
    setting: `[L][H]` the gate of each head; scan: what retrievals read. loss, tail, cost: `[G]` predicted on
    the fit split, open loop: mean dropped mass, that of the worst steps, and KV rows read as a fraction of
    dense (scans included).
    """

    lam: np.ndarray
    budget_ratio: np.ndarray
    setting: list[list[GateSetting]]
    scan: Scan
    loss: np.ndarray
    tail: np.ndarray
    cost: np.ndarray

    def cost_at(self, loss: float) -> float:
        """Predicted cost at a predicted loss, linear between the points."""
        return float(np.interp(loss, self.loss[::-1], self.cost[::-1]))


def read_cost(kept: np.ndarray, retrieval_ratio: np.ndarray, scan_row: float = 1.0) -> np.ndarray:
    """KV rows read as a fraction of dense: K and V of the kept positions, and a scan of all positions per
    retrieval, at `scan_row` rows of K each.

    `kept` `[settings, ratios, L, H]`, `retrieval_ratio` `[settings, L, H]`; a dense head needs no scan.
    """
    cost = kept + 0.5 * scan_row * retrieval_ratio[:, None]
    cost[:, -1] = 1.0
    return np.asarray(cost)


def dial_targets(delta: float, num_prompts: int) -> np.ndarray:
    """Open-loop losses at which the dial gets its sparse points, decreasing.

    A coarse dial gives away what lies between two points, so they stand where risk control is likely to look:
    a little below the largest mean loss that `num_prompts` prompts admit at the usual δ, and closer together
    below that of the δ asked for.
    """

    usual = [MARGIN * admitted_loss(other, num_prompts) for other in USUAL_DELTAS]
    return np.unique([*usual, *(admitted_loss(delta, num_prompts) * NEAR)])[::-1]


def admitted_loss(delta: float, num_prompts: int) -> float:
    """Largest mean loss on `num_prompts` prompts that lets risk control promise δ (a little, where none)."""
    return max(((num_prompts + 1) * delta - 1) / num_prompts, delta / 10)


def fit_dial(
    statistics: TimeStatistics,
    scan: Scan,
    delta: float,
    targets: np.ndarray,
    tail_weight: float = TAIL_WEIGHT,
) -> Dial:
    """Choose a gate per head, then budgets that read fewest bytes at each mean loss of `targets`, decreasing.

    A mean hides the steps at which a head does what it is there for, so a head pays for a blend of its mean
    loss and that of its worst steps. Every head's (cost, blend) points have a lower convex hull; at a price μ
    each head takes the hull point that minimises cost + μ blend, which is optimal for the sum; μ is the one
    at which the *mean* loss meets the target. The gate is the one each head wants at `delta`, and stays fixed
    along the dial: only then are the sets of a head nested in λ.
    """
    cost = read_cost(statistics.kept, statistics.retrieval_ratio, scan.row)
    loss, tail = statistics.loss + scan.extra, statistics.tail + scan.extra
    cost[:, -1], loss[:, -1], tail[:, -1] = 1.0, 0.0, 0.0
    settings, ratios, num_layers, heads = loss.shape
    blend = (1 - tail_weight) * loss + tail_weight * tail
    flat_blend, flat_cost, flat_loss = (table.reshape(settings * ratios, -1) for table in (blend, cost, loss))
    price = _price_for(flat_blend, flat_cost, flat_loss, delta)
    gate = _preferred_gate(blend, cost, price).reshape(-1)
    columns = np.arange(num_layers * heads)
    own_blend, own_cost, own_loss, own_tail = (
        table.reshape(settings, ratios, -1)[gate, :, columns].T for table in (blend, cost, loss, tail)
    )
    rows: list[np.ndarray] = []
    for target in targets:
        choice = _choose(own_blend, own_cost, _price_for(own_blend, own_cost, own_loss, target))
        if not rows or (choice >= rows[-1]).all() and (choice > rows[-1]).any():
            rows.append(choice)
    if (rows[-1] < ratios - 1).any():
        rows.append(np.full_like(columns, ratios - 1))
    table = np.array(rows)
    budget = np.array(BUDGET_RATIOS)[table]
    return Dial(
        lam=budget.mean(axis=1),
        budget_ratio=budget.reshape(-1, num_layers, heads),
        setting=[[statistics.settings[g] for g in row] for row in gate.reshape(num_layers, heads)],
        scan=scan,
        loss=own_loss[table, columns].mean(axis=1),
        tail=own_tail[table, columns].mean(axis=1),
        cost=own_cost[table, columns].mean(axis=1),
    )


def _choose(loss: np.ndarray, cost: np.ndarray, price: float) -> np.ndarray:
    """Index of the point each column takes at a price: hull points only, the larger budget on a tie."""
    total = cost + price * loss
    return total.shape[0] - 1 - np.asarray(total[::-1].argmin(axis=0))


def _price_for(blend: np.ndarray, cost: np.ndarray, loss: np.ndarray, target: float) -> float:
    """Smallest price of the blend (bisecting its logarithm) at which the mean loss is at most `target`."""
    low, high = -6.0, 9.0
    columns = np.arange(loss.shape[1])
    for _ in range(60):
        middle = (low + high) / 2
        mean = loss[_choose(blend, cost, np.exp(middle)), columns].mean()
        low, high = (low, middle) if mean <= target else (middle, high)
    return float(np.exp(high))


def _preferred_gate(loss: np.ndarray, cost: np.ndarray, price: float) -> np.ndarray:
    """Gate of each head at a price, `[L, H]`; where dense wins, the gate of the best sparse point near it."""
    total = (cost + price * loss)[:, :-1]  # a dense head does not gate, so it must not decide
    return np.asarray(total.min(axis=1).argmin(axis=0))


def dense_dial(statistics: TimeStatistics, scan: Scan) -> Dial:
    """Two points for a calibration without the time axis: depth and layer axes on with full budgets, and
    dense."""
    _, _, num_layers, heads = statistics.loss.shape
    # just below 1: the bundle tells "all axes off" from "time axis off" by the budget alone
    budget = np.stack(
        [
            np.full((num_layers, heads), np.nextafter(np.float32(1), np.float32(0))),
            np.ones((num_layers, heads)),
        ]
    )
    return Dial(
        lam=budget.mean(axis=(1, 2)),
        budget_ratio=budget,
        setting=[[statistics.settings[0]] * heads for _ in range(num_layers)],
        scan=scan,
        loss=np.zeros(2),
        tail=np.zeros(2),
        cost=np.ones(2),
    )

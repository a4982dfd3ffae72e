"""Schedules and budgets on planted statistics, where the right answer is known."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest

from prhs_calibration import fit
from prhs_calibration.key_copies import Scan
from prhs_calibration.statistics import BUDGET_RATIOS, FRACTIONS, TimeStatistics, gate_settings
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import DepthParams, Gate

RATIOS = np.array(BUDGET_RATIOS)
TARGETS = np.geomspace(0.3, 0.003, 11)
EXACT = Scan(KeyCopyKind.EXACT, 1.0, np.zeros(1), np.ones(len(RATIOS)))


def planted_loss(num_layers: int, start: int, base: float, tolerance: float) -> np.ndarray:
    """Losses that cross `tolerance` exactly at the paper's curve: linear in the fraction."""
    fractions = fit.curve(np.arange(num_layers), start, num_layers, base)
    slope = np.where(fractions > 0, tolerance / np.maximum(fractions, 1e-9), 1.0)
    return slope[:, None] * np.array(FRACTIONS)[None, :]


def test_the_curve_is_the_schedule_of_the_parameters() -> None:
    params = DepthParams(start_layer=3, phi=0.4)
    ours = fit.curve(np.arange(10), 3, 10, 0.4)
    np.testing.assert_allclose(ours, [params.window_fraction(layer, 10) for layer in range(10)])


def test_a_planted_schedule_is_recovered() -> None:
    loss = planted_loss(12, start=4, base=0.3, tolerance=0.01)
    target = fit.tolerated_fractions(loss, 0.01)
    np.testing.assert_allclose(target[5:], fit.curve(np.arange(5, 12), 4, 12, 0.3), atol=1e-9)
    schedule = fit.fit_schedule(loss, tolerance=0.01)
    assert schedule is not None and schedule.start_layer == 4
    assert fit.predicted_loss(schedule, loss) <= 0.01


@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_never_costs_more_than_allowed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss = np.cumsum(rng.exponential(0.01, (8, len(FRACTIONS))), axis=1)
    loss[:, 0] = 0.0
    schedule = fit.fit_schedule(loss, tolerance=0.005)
    assert schedule is None or fit.predicted_loss(schedule, loss) <= 0.005


def test_a_schedule_that_drops_nothing_is_left_out() -> None:
    loss = np.ones((8, len(FRACTIONS)))
    loss[:, 0] = 0.0
    assert fit.fit_schedule(loss, tolerance=1e-4) is None


def test_tolerated_fractions_do_not_trust_a_dip() -> None:
    row = np.full(len(FRACTIONS), 0.0)
    row[5], row[6:] = 0.5, 0.0
    (found,) = fit.tolerated_fractions(row[None, :], 0.1)
    assert FRACTIONS[4] <= found < FRACTIONS[5]


def statistics(
    decay: np.ndarray, share_loss: float, ratio: float, tail_factor: np.ndarray | None = None
) -> TimeStatistics:
    """Heads whose loss decays exponentially in the budget; sharing adds `share_loss` and scans `ratio` of the
    steps. tail_factor: how much worse the worst steps are, broadcast to `[settings, ratios, L, H]`.
    """
    settings = gate_settings()
    num_layers, heads = decay.shape
    loss = np.empty((len(settings), len(RATIOS), num_layers, heads))
    for index, setting in enumerate(settings):
        extra = 0.0 if setting.gate is Gate.NEVER else share_loss
        loss[index] = np.exp(-decay[None] * RATIOS[:, None, None]) + extra
    loss[:, -1] = 0.0
    kept = np.broadcast_to(RATIOS[None, :, None, None], loss.shape).copy()
    retrieved = np.array([1.0 if s.gate is Gate.NEVER else ratio for s in settings])
    scans = np.broadcast_to(retrieved[:, None, None], (len(settings), num_layers, heads)).copy()
    tail = loss * (tail_factor if tail_factor is not None else 1.0)
    fake = types.SimpleNamespace(loss=loss, tail=tail, kept=kept, retrieval_ratio=scans, settings=settings)
    return fake  # type: ignore[return-value]


def test_the_dial_is_nested_ends_dense_and_loses_less_and_less() -> None:
    rng = np.random.default_rng(0)
    dial = fit.fit_dial(statistics(rng.uniform(2, 60, (4, 2)), 0.1, 0.3), EXACT, 0.02, TARGETS)
    assert (np.diff(dial.budget_ratio, axis=0) >= 0).all()
    assert (np.diff(dial.lam) > 0).all() and dial.lam[-1] == 1.0
    assert (np.diff(dial.loss) <= 0).all() and dial.loss[-1] == 0.0
    assert dial.cost[-1] == 1.0


def test_a_head_that_decays_slowly_gets_the_larger_budget() -> None:
    dial = fit.fit_dial(statistics(np.array([[4.0, 60.0]]), 0.0, 0.2), EXACT, 0.05, TARGETS)
    middle = len(dial.lam) // 2
    assert dial.budget_ratio[middle, 0, 0] > dial.budget_ratio[middle, 0, 1]


def test_no_other_allocation_reads_less_at_the_same_loss() -> None:
    stats = statistics(np.array([[6.0, 25.0, 50.0]]), 0.0, 1.0)
    dial = fit.fit_dial(stats, EXACT, 0.05, np.geomspace(0.2, 0.01, 7))
    cost = fit.read_cost(stats.kept, stats.retrieval_ratio)[0, :, 0]
    loss = stats.loss[0, :, 0]
    for point in range(len(dial.lam)):
        for choice in itertools.product(range(len(RATIOS)), repeat=3):
            other_loss = np.mean([loss[c, h] for h, c in enumerate(choice)])
            other_cost = np.mean([cost[c, h] for h, c in enumerate(choice)])
            assert other_loss > dial.loss[point] - 1e-12 or other_cost >= dial.cost[point] - 1e-12


@pytest.mark.parametrize(("share_loss", "shares"), [(0.0, True), (0.5, False)])
def test_heads_share_only_where_it_pays(share_loss: float, shares: bool) -> None:
    dial = fit.fit_dial(statistics(np.full((2, 2), 40.0), share_loss, 0.2), EXACT, 0.02, TARGETS)
    gates = {setting.gate for row in dial.setting for setting in row}
    assert (gates != {Gate.NEVER}) is shares


def test_a_head_whose_worst_steps_break_does_not_share() -> None:
    """Two heads of the same mean loss; sharing ruins the worst steps of the second one only."""
    factor = np.ones((len(gate_settings()), 1, 1, 2))
    factor[[setting.gate is not Gate.NEVER for setting in gate_settings()], :, :, 1] = 12.0
    stats = statistics(np.full((1, 2), 40.0), 0.004, 0.95, factor)
    assert all(s.gate is not Gate.NEVER for s in fit.fit_dial(stats, EXACT, 0.03, TARGETS, 0.0).setting[0])
    first, second = fit.fit_dial(stats, EXACT, 0.03, TARGETS, 0.9).setting[0]
    assert first.gate is not Gate.NEVER and second.gate is Gate.NEVER


def test_budgets_meet_their_mean_loss_whatever_the_tail() -> None:
    rng = np.random.default_rng(1)
    stats = statistics(rng.uniform(5, 60, (4, 2)), 0.0, 0.5, rng.uniform(1, 5, (1, 1, 4, 2)))
    dial = fit.fit_dial(stats, EXACT, 0.02, TARGETS)
    assert dial.loss[0] <= TARGETS[0] and (dial.tail[:-1] > dial.loss[:-1]).all()


def test_a_cheaper_scan_is_used_more_and_reads_less() -> None:
    stats = statistics(np.full((2, 2), 40.0), 0.012, 0.85)
    cheap = Scan(KeyCopyKind.INT4, 0.25, np.zeros(1), np.ones(len(RATIOS)))
    dials = [fit.fit_dial(stats, scan, 0.02, TARGETS) for scan in (EXACT, cheap)]
    assert {s.gate is Gate.NEVER for row in dials[0].setting for s in row} == {False}
    assert {s.gate is Gate.NEVER for row in dials[1].setting for s in row} == {True}
    assert dials[1].cost_at(0.01) < dials[0].cost_at(0.01)


def test_a_scan_that_ranks_badly_pays_for_it() -> None:
    stats = statistics(np.full((2, 2), 40.0), 0.02, 0.2)
    blind = Scan(KeyCopyKind.INT4, 0.25, np.full((len(RATIOS), 2, 2), 0.05), np.full(len(RATIOS), 0.3))
    dials = [fit.fit_dial(stats, scan, 0.02, TARGETS) for scan in (EXACT, blind)]
    assert dials[1].cost_at(0.01) > dials[0].cost_at(0.01)


def test_reading_costs_scans_except_in_dense_heads() -> None:
    kept = np.full((1, len(RATIOS), 1, 1), 0.25)
    cost = fit.read_cost(kept, np.full((1, 1, 1), 0.4))
    assert cost[0, 0, 0, 0] == pytest.approx(0.25 + 0.2)
    assert cost[0, -1, 0, 0] == 1.0
    assert fit.read_cost(kept, np.full((1, 1, 1), 0.4), 0.25)[0, 0, 0, 0] == pytest.approx(0.25 + 0.05)


def test_the_dial_has_a_point_just_below_what_risk_control_admits() -> None:
    targets = fit.dial_targets(0.02, num_prompts=128)
    assert (np.diff(targets) < 0).all()
    for delta in (0.2, 0.1, 0.05, 0.02):
        admitted = (129 * delta - 1) / 128
        below = targets[targets <= 0.97 * admitted]
        assert below[0] > 0.9 * admitted

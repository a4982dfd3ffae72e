"""The profile's tables against the selector itself: what they predict is what `cis.select` does to the same
rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from prhs_calibration.statistics import (
    BUDGET_RATIOS,
    FRACTIONS,
    DepthStatistics,
    GateSetting,
    TimeStatistics,
    worst_steps,
)
from prhs_kernels.params import DepthParams, Gate, SelectorParams, TimeParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors import cis
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.testing.models import tiny_model

SINKS, LOCAL = 2, 4


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 128, (count,), generator=generator).tolist()


def observations(
    seed: int = 0, depth: DepthParams | None = None
) -> tuple[SelectorParams, list[LayerObservation]]:
    model = tiny_model("llama").double()
    params = dataclasses.replace(dense_params(model.config), num_sinks=SINKS, num_local=LOCAL, depth=depth)
    seen: list[LayerObservation] = []
    Scorer(model, tokens(90, seed), 60).run(params, seen.append)
    return params, seen


def time_params(params: SelectorParams, setting: GateSetting, ratio: float) -> SelectorParams:
    shape = (params.num_layers, params.num_kv_heads)

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype)

    time = TimeParams(
        budget_ratio=full(ratio, torch.float64),
        budget_tokens=full(0, torch.int32),
        gate=full(setting.gate, torch.uint8),
        tau_cos=full(setting.tau_cos, torch.float64),
        block=full(setting.block, torch.int32),
        dilation=full(setting.dilation, torch.int32),
    )
    return dataclasses.replace(params, time=time)


def selected(rows: LayerObservation, params: SelectorParams) -> cis.Selection:
    """What the selector keeps of these very rows, open loop."""
    place = Rows(rows.positions, torch.zeros(1, dtype=torch.long), rows.kept.shape[-1])
    group = params.group_size
    scores = torch.matmul(rows.query, rows.keys.repeat_interleave(group, 1).transpose(-1, -2)) * rows.scale
    packed = scores.view(1, params.num_kv_heads, group, *scores.shape[2:])
    allowed = candidates(place, params, rows.layer)
    return cis.select(rows.query, rows.query_pre, lambda: packed, allowed, place, params, rows.layer, None)[0]


@pytest.mark.parametrize("depth", [None, DepthParams(1, 0.6)])
def test_time_statistics_predict_the_selector(depth: DepthParams | None) -> None:
    params, seen = observations(depth=depth)
    statistics = TimeStatistics(params.num_layers, params.num_kv_heads, SINKS, LOCAL)
    for rows in seen:
        statistics.add(rows)
    settings = [0, 1, 5, 16, 34, 55, 75, 90, 111, 125]
    assert {statistics.settings[i].gate for i in settings} == set(Gate)
    for index in settings:
        for place in (0, 4, 8, 11):
            chosen = time_params(params, statistics.settings[index], BUDGET_RATIOS[place])
            for rows in seen:
                selection = selected(rows, chosen)
                kept = selection.kept[0].repeat_interleave(params.group_size, 0)
                dropped = 1 - (rows.dense_probs * kept).sum(-1)
                by_head = dropped.view(params.num_kv_heads, -1).mean(-1).numpy()
                np.testing.assert_allclose(statistics.loss[index, place, rows.layer], by_head, atol=1e-9)
                worst = dropped.view(params.num_kv_heads, params.group_size, -1).mean(1).sort(-1).values
                tail = worst[:, -2:].mean(-1)  # 5 % of 30 steps
                np.testing.assert_allclose(statistics.tail[index, place, rows.layer], tail, atol=1e-9)
                if depth is None:  # under a window the table may count a set member that has left it
                    fraction = (selection.kept[0].sum(-1).double() / rows.visible.sum(-1)).mean(-1).numpy()
                    np.testing.assert_allclose(statistics.kept[index, place, rows.layer], fraction, atol=1e-9)
                    if bool(selection.contested.all()):
                        ratio = selection.retrieved[0].double().mean(-1).numpy()
                        np.testing.assert_allclose(statistics.retrieval_ratio[index, rows.layer], ratio)


def test_the_worst_steps_are_a_twentieth_and_at_least_one() -> None:
    loss = np.arange(64.0)
    assert worst_steps(np.random.default_rng(0).permutation(loss)) == 62.0  # 61, 62, 63
    np.testing.assert_array_equal(worst_steps(np.array([[0.1, 0.3, 0.2], [0.0, 0.0, 0.5]])), [0.3, 0.5])


def test_a_dense_head_loses_nothing() -> None:
    params, seen = observations()
    statistics = TimeStatistics(params.num_layers, params.num_kv_heads, SINKS, LOCAL)
    for rows in seen:
        statistics.add(rows)
    assert BUDGET_RATIOS[-1] == 1.0
    np.testing.assert_allclose(statistics.loss[:, -1], 0.0, atol=1e-9)
    np.testing.assert_allclose(statistics.kept[:, -1], 1.0)
    assert (np.diff(statistics.loss[0], axis=0) <= 1e-12).all()


def test_a_second_prompt_changes_every_mean_and_weighs_the_same() -> None:
    params, first = observations(seed=0)
    _, second = observations(seed=1)
    one, other, both = (
        TimeStatistics(params.num_layers, params.num_kv_heads, SINKS, LOCAL) for _ in range(3)
    )
    depth_one, depth_other, depth_both = (DepthStatistics(params.num_layers, SINKS, LOCAL) for _ in range(3))
    for rows in first:
        for accumulator in (one, both, depth_one, depth_both):
            accumulator.add(rows)
    for rows in second:
        for accumulator in (other, both, depth_other, depth_both):
            accumulator.add(rows)
    for name in ("loss", "tail", "kept", "retrieval_ratio", "cosine"):
        mean = (getattr(one, name) + getattr(other, name)) / 2
        np.testing.assert_allclose(getattr(both, name), mean, atol=1e-12)
    assert not np.allclose(one.loss, both.loss)
    for name in ("window_loss", "share_loss", "similarity"):
        mean = (getattr(depth_one, name) + getattr(depth_other, name)) / 2
        np.testing.assert_allclose(getattr(depth_both, name), mean, atol=1e-12)


def test_window_loss_is_the_mass_that_psaw_drops() -> None:
    params, seen = observations()
    statistics = DepthStatistics(params.num_layers, SINKS, LOCAL)
    for rows in seen:
        statistics.add(rows)
    # phi chosen so that layer 3 of 4 drops exactly the fraction 0.5 when the window starts at layer 2
    windowed = dataclasses.replace(params, depth=DepthParams(2, 0.25))
    fraction = windowed.depth.window_fraction(3, 4) if windowed.depth else 0.0
    assert fraction == 0.5
    rows = seen[3]
    place = Rows(rows.positions, torch.zeros(1, dtype=torch.long), rows.kept.shape[-1])
    dropped = 1 - (rows.dense_probs * candidates(place, windowed, 3)).sum(-1).mean().item()
    assert statistics.window_loss[3, FRACTIONS.index(0.5)] == pytest.approx(dropped, abs=1e-9)


def test_share_loss_is_zero_without_sharing_and_similarity_is_a_cosine() -> None:
    params, seen = observations()
    statistics = DepthStatistics(params.num_layers, SINKS, LOCAL)
    for rows in seen:
        statistics.add(rows)
    assert (statistics.share_loss[:, 0] == 0).all()
    assert (statistics.share_loss[1:, -1] > 0).all()
    assert np.isnan(statistics.similarity[:, 0]).all()
    assert (np.abs(statistics.similarity[:, 1:]) <= 1).all()
    same = dataclasses.replace(seen[1], layer=1)
    twin = DepthStatistics(params.num_layers, SINKS, LOCAL)
    twin.add(dataclasses.replace(seen[1], layer=0))
    twin.add(same)
    np.testing.assert_allclose(twin.share_loss[1], 0.0, atol=1e-9)
    np.testing.assert_allclose(twin.similarity[:, 1], 1.0)

"""The schedules against hand-computed values, their monotonicity, and what the dataclasses refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from prhs_kernels.errors import InputError
from prhs_kernels.params import DepthParams, FreezeMode, Gate, LayerParams, SelectorParams, TimeParams
from prhs_kernels.selectors.cis import middle_budget
from prhs_kernels.testing.inputs import time_params


def make(**axes: Any) -> SelectorParams:
    return SelectorParams(num_layers=8, num_qo_heads=8, num_kv_heads=2, head_dim=16, **axes)


def test_window_schedule_by_hand() -> None:
    # alpha (l - l_s) / (L - l_s) = 2 * 3 / 6 = 1, so the fraction is 1 - 0.25
    params = make(depth=DepthParams(start_layer=2, phi=0.25, alpha=2.0))
    starts = params.window_start(5, torch.tensor([0, 1, 2, 3, 4, 1000]))
    assert starts.tolist() == [0, 0, 1, 2, 3, 750]


def test_frozen_schedule_by_hand() -> None:
    # gamma (l - l_s) / (L - l_s) = 1 * 4 / 8 = 0.5, so the fraction is 1 - sqrt(0.25)
    params = make(layer=LayerParams(start_layer=0, psi=0.25))
    assert [params.frozen_prefix(4, length) for length in (1, 2, 3, 100)] == [0, 1, 1, 50]


@pytest.mark.parametrize("start", [0, 3, 7])
def test_schedules_are_zero_up_to_the_start_layer(start: int) -> None:
    params = make(depth=DepthParams(start, 0.1), layer=LayerParams(start, 0.1))
    positions = torch.arange(0, 5000, 7)
    for layer in range(start + 1):
        assert not params.window_start(layer, positions).any()
        assert params.frozen_prefix(layer, 5000) == 0
    for layer in range(start + 1, 8):
        assert params.window_start(layer, positions)[-1] > 0
        assert params.frozen_prefix(layer, 5000) > 0


@pytest.mark.parametrize(("base", "power"), [(0.05, 1.0), (0.7, 1.0), (0.999, 3.0), (0.3, 0.0), (0.01, 9.0)])
def test_schedules_never_decrease_and_leave_the_newest(base: float, power: float) -> None:
    params = make(depth=DepthParams(1, base, power), layer=LayerParams(1, base, power))
    positions = torch.arange(3000)
    windows = torch.stack([params.window_start(layer, positions) for layer in range(8)])
    frozen = torch.tensor([[params.frozen_prefix(layer, int(t)) for t in positions] for layer in range(8)])
    for table in (windows, frozen):
        assert (table.diff(dim=1) >= 0).all(), "a position that was dropped came back"
        assert (table.diff(dim=0) >= 0).all(), "a deeper layer sees or computes more"
    assert (windows <= positions).all()
    assert (frozen[:, 1:] < positions[1:]).all(), "the last token of a prompt must be computed"


def test_window_start_is_exact_far_out() -> None:
    """Positions of 2^40 are floored in float64, not float32."""
    params = make(depth=DepthParams(0, 0.5))
    position = 2**40 + 12345
    assert params.window_start(7, torch.tensor([position])).item() == int((1 - 0.5 ** (7 / 8)) * position)


def test_axes_off() -> None:
    assert make().is_dense
    assert make().window_start(5, torch.arange(4)).tolist() == [0, 0, 0, 0]
    assert make().frozen_prefix(5, 100) == 0
    assert not make(depth=DepthParams(0, 0.5)).is_dense
    assert make().group_size == 4


def test_middle_budget_floors_the_ratio_and_adds_tokens() -> None:
    time = time_params(8, 3, budget_ratio=[0.25, 0.0, 1.0], budget_tokens=[3, 7, 0])
    kv_len = torch.tensor([[1, 7, 8, 1000]])
    assert middle_budget(time, 0, kv_len)[0].tolist() == [[3, 4, 5, 253], [7, 7, 7, 7], [1, 7, 8, 1000]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget_ratio", -0.1),
        ("budget_ratio", float("nan")),
        ("budget_ratio", float("inf")),
        ("budget_tokens", -1),
        ("gate", 3),
        ("tau_cos", 1.5),
        ("tau_cos", float("nan")),
        ("block", 0),
        ("dilation", -1),
    ],
)
def test_time_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"time/{field}"):
        make(time=time_params(8, 2, **{field: value}))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TimeParams)][:-1])
def test_time_tables_of_another_model_are_refused_by_name(field: str) -> None:
    good = time_params(8, 2)
    with pytest.raises(InputError, match=rf"time/{field}.*\(8, 3\).*\(8, 2\)"):
        make(time=dataclasses.replace(good, **{field: getattr(time_params(8, 3), field)}))


@pytest.mark.parametrize(
    "axes",
    [
        {"depth": DepthParams(8, 0.5)},
        {"depth": DepthParams(-1, 0.5)},
        {"depth": DepthParams(0, 0.0)},
        {"depth": DepthParams(0, 1.0)},
        {"depth": DepthParams(0, 0.5, -1.0)},
        {"layer": LayerParams(8, 0.5)},
        {"layer": LayerParams(0, 1.5)},
        {"layer": LayerParams(0, 0.5, float("nan"))},
    ],
)
def test_schedules_out_of_range_are_refused(axes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="schedule out of range") as caught:
        make(**axes)
    assert next(iter(axes)) in str(caught.value) and "\n" not in str(caught.value)


def test_head_counts_and_kept_ends_are_checked() -> None:
    with pytest.raises(InputError, match="num_qo_heads = 6 is not a multiple of num_kv_heads = 4"):
        SelectorParams(num_layers=1, num_qo_heads=6, num_kv_heads=4, head_dim=8)
    for ends in ({"num_sinks": -1}, {"num_local": 0}):
        with pytest.raises(InputError, match="num_local"):
            make(**ends)


def test_enums_are_what_bundles_store() -> None:
    """Values on disk: changing one would misread every bundle."""
    assert {gate.name: int(gate) for gate in Gate} == {"NEVER": 0, "POST_ROPE": 1, "PRE_ROPE": 2}
    assert {mode.name: int(mode) for mode in FreezeMode} == {"SHARE": 0, "PROJECT": 1}

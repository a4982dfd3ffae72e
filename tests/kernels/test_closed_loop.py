"""Whole models, prefill and decode, against the naive implementation: every family, every mix of the axes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import DepthParams, FreezeMode, Gate, LayerParams, SelectorParams
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.testing import naive
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.runs import VARIANTS, decode_steps

PREFILL, STEPS = 40, 14
# a head of 16 dimensions: 32 bytes in a 16-bit cache; codes and a scale of 4 bytes in a copy
SCAN_ROW = {"exact": 1.0, "int8": 20 / 32, "fp8": 20 / 32, "int4": 12 / 32}
EXACT = 1e-10  # float64 on logits of order 1: anything above is another set or another formula

TIME = {"budget_tokens": [4, 6], "gate": [Gate.POST_ROPE, Gate.PRE_ROPE], "tau_cos": 0.1, "block": 5}
AXES: dict[str, dict[str, Any]] = {
    "off": {},
    "time": {"time": TIME},
    "time-ratio": {"time": {"budget_ratio": [0.1, 1.0], "tau_cos": 0.2, "block": 3, "reanchor": False}},
    **{f"time-{kind}": {"time": TIME, "key_copy": kind} for kind in KeyCopyKind if kind != KeyCopyKind.EXACT},
    "depth": {"depth": DepthParams(1, 0.3)},
    "share": {"layer": LayerParams(0, 0.4)},
    "project": {"layer": LayerParams(1, 0.3, 1.0, FreezeMode.PROJECT)},
    "all": {"time": TIME, "depth": DepthParams(1, 0.3), "layer": LayerParams(1, 0.4)},
    "all-project": {
        "time": TIME,
        "depth": DepthParams(0, 0.2),
        "layer": LayerParams(0, 0.3, 1.0, FreezeMode.PROJECT),
    },
}


def expected_stats(run: naive.NaiveRun, params: SelectorParams, window: list[int | None]) -> dict[str, float]:
    """The four figures counted step by step."""
    units = kept = retrieved = contested = rows = visible = 0
    fraction = 0.0
    for layer, heads in enumerate(run.steps):
        for steps in heads:
            for index, step in enumerate(steps):
                t = PREFILL + index
                seen = min(t + 1, window[layer] or t + 1)
                units, kept, visible = units + 1, kept + len(step.kept), visible + seen
                fraction += len(step.kept) / seen
                retrieved, contested = retrieved + step.retrieved, contested + step.contested
                scan = len(naive.visible(params, layer, t, window[layer])) if step.retrieved else 0
                rows += 2 * len(step.kept) + SCAN_ROW[params.key_copy] * scan + params.group_size * step.gated
    return {
        "retrieval_ratio": retrieved / contested if contested else math.nan,
        "effective_budget": kept / units,
        "attended_fraction": fraction / units,
        "kv_bytes_read": rows / (2 * visible),
    }


def assert_same_sets(seen: list[LayerObservation], run: naive.NaiveRun, first: int = 0) -> None:
    for one in seen:
        for head, steps in enumerate(run.steps[one.layer]):
            for index in range(len(one.positions)):
                at = int(one.positions[index]) - PREFILL
                kept = set(one.kept[head, index].nonzero().flatten().tolist())
                assert kept == steps[at].kept, f"layer {one.layer} head {head} step {at}"
                assert bool(one.retrieved[head, index]) == steps[at].retrieved
                assert bool(one.contested[head, index]) == steps[at].contested


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step_and_layer_parallel_equal_the_naive_model(variant: str, axes: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES[axes])
    tokens = random_tokens(PREFILL + STEPS, seed=1)
    expected = naive.NaiveModel(model, params).run(tokens, PREFILL)
    window = [
        overrides.get("sliding_window") if layer >= overrides.get("max_window_layers", 0) else None
        for layer in range(params.num_layers)
    ]

    def check_stats(stats: DecodeStats) -> None:
        counted = expected_stats(expected, params, window)
        assert stats.to_dict() == pytest.approx(counted, rel=1e-12, nan_ok=True)

    logits, stats = decode_steps(model, tokens, PREFILL, params)
    torch.testing.assert_close(logits, expected.logits, rtol=EXACT, atol=EXACT)
    check_stats(stats)

    single: list[LayerObservation] = []  # the same steps, watched: through the masked path
    watched, _ = decode_steps(model, tokens, PREFILL, params, single.append)
    torch.testing.assert_close(watched, expected.logits, rtol=EXACT, atol=EXACT)
    assert len(single) == STEPS * params.num_layers
    assert_same_sets(single, expected)

    at_once: list[LayerObservation] = []
    result = Scorer(model, tokens, PREFILL).run(params, at_once.append)
    torch.testing.assert_close(result.logits, expected.logits[1:], rtol=EXACT, atol=EXACT)
    assert [one.layer for one in at_once] == list(range(params.num_layers))
    assert_same_sets(at_once, expected)
    check_stats(result.stats)
    for one in at_once:
        torch.testing.assert_close(one.keys[0].transpose(0, 1), expected.keys[one.layer])

    if params.time is not None:
        steps = [step for heads in expected.steps for head in heads for step in head]
        assert any(step.contested and not step.retrieved for step in steps), "no set was reused"
        assert any(step.gated and step.retrieved for step in steps), "the gate never refused"

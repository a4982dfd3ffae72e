"""What a low-bit scan costs: measured figures against the selector itself, and copies that rank badly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from prhs_calibration.key_copies import SAMPLE_EVERY, KeyCopyStatistics, kinds_to_compare
from prhs_calibration.statistics import BUDGET_RATIOS
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.sparse_decode.reference import grouped_scores
from prhs_kernels.params import Gate, SelectorParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.testing.inputs import random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model

KINDS = (KeyCopyKind.EXACT, KeyCopyKind.INT8, KeyCopyKind.INT4)
PREFILL, STEPS = 60, 29


def sharp_model() -> torch.nn.Module:
    """Logits wide enough that rounding the keys changes the order."""
    model = tiny_model("llama").double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 6
    return model


@pytest.fixture(scope="module")
def measured() -> tuple[SelectorParams, list[LayerObservation], KeyCopyStatistics]:
    model = sharp_model()
    params = dataclasses.replace(dense_params(model.config), num_sinks=2, num_local=4)
    seen: list[LayerObservation] = []
    statistics = KeyCopyStatistics(params, KINDS)
    Scorer(model, random_tokens(PREFILL + STEPS, 0), PREFILL).run(params, seen.append)
    for rows in seen:
        statistics.add(rows)
    return params, seen, statistics


def test_the_mass_lost_is_what_the_selector_loses_in_layer_0(
    measured: tuple[SelectorParams, list[LayerObservation], KeyCopyStatistics],
) -> None:
    """Layer 0 has the same queries in every run, so closed and open loop agree there."""
    _, _, statistics = measured
    model, place = sharp_model(), BUDGET_RATIOS.index(0.2)
    losses = {}
    for kind in KINDS:
        time = {"budget_ratio": BUDGET_RATIOS[place], "gate": Gate.NEVER, "block": 1, "dilation": 0}
        params = selector_params(model.config, time=time, key_copy=kind)
        layers: list[LayerObservation] = []
        Scorer(model, random_tokens(PREFILL + STEPS, 0), PREFILL).run(params, layers.append)
        dropped = 1 - (layers[0].dense_probs * layers[0].kept.repeat_interleave(params.group_size, 0)).sum(-1)
        losses[kind] = dropped[:, ::SAMPLE_EVERY].reshape(params.num_kv_heads, -1).mean(-1)
    for scan in statistics.scans():
        expected = losses[scan.kind] - losses[KeyCopyKind.EXACT]
        np.testing.assert_allclose(scan.extra[place, 0], expected, atol=1e-9)
    assert (statistics.scans()[2].extra[place] > 0).any()


def test_fewer_bits_find_less_and_cost_less(
    measured: tuple[SelectorParams, list[LayerObservation], KeyCopyStatistics],
) -> None:
    exact, int8, int4 = measured[2].scans()
    assert exact.mean_recall == 1.0 and (exact.extra == 0).all()
    assert 0.5 < int4.mean_recall < int8.mean_recall < 1.0
    assert int4.row < int8.row < exact.row == 1.0
    assert (int4.extra > -1e-9).all(), "no ranking retains more than the exact one"
    for scan in (int8, int4):
        assert scan.recall[-1] == 1.0 and (scan.extra[-1] == 0).all(), "a dense head does not scan"


def test_an_outlier_that_eats_the_codes_is_seen(
    measured: tuple[SelectorParams, list[LayerObservation], KeyCopyStatistics],
) -> None:
    """One huge coordinate that no query looks at: four bits are left with nothing for the others."""
    params, seen, _ = measured
    statistics = KeyCopyStatistics(params, [KeyCopyKind.INT4])
    for rows in seen:
        keys, query = rows.keys.clone(), rows.query.clone()
        keys[..., 0], query[..., 0] = 1000.0, 0.0
        scores = grouped_scores(query, keys, rows.scale).masked_fill(~rows.visible, -torch.inf)
        probs = scores.softmax(-1)[0].flatten(0, 1)
        statistics.add(dataclasses.replace(rows, keys=keys, query=query, dense_probs=probs))
    (scan,) = statistics.scans()
    place = BUDGET_RATIOS.index(0.1)
    assert scan.recall[place] < 0.3 and (scan.extra[place] > 0.01).all()


def test_auto_compares_all_but_fp8() -> None:
    assert set(kinds_to_compare("auto")) == set(KeyCopyKind) - {KeyCopyKind.FP8}
    assert kinds_to_compare("fp8") == (KeyCopyKind.FP8,)

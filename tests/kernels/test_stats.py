"""ρ, effective budget, attended fraction and KV bytes against figures counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import Gate, SelectorParams
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.selectors.cis import Selection
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.runs import VARIANTS, decode_steps, feed


def flags(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)[None]


def test_a_small_case_by_hand() -> None:
    """Two KV heads with two query heads each, two steps, at kv_len 4 and 5.

    Head 0 scans 4 and keeps 2, then asks its gate and reuses, keeping 3. Head 1 is dense.
    """
    visible = torch.ones(2, 5, dtype=torch.bool).tril(3)[None]
    kept = torch.stack([flags([1, 0, 0, 1, 0], [1, 0, 0, 1, 1])[0], visible[0]])[None]
    selection = Selection(
        kept, retrieved=flags([1, 0], [0, 0]), contested=flags([1, 1], [0, 0]), gated=flags([0, 1], [0, 0])
    )
    stats = DecodeStats()
    stats.add(kept, visible, visible, selection, group=2)
    assert stats.retrieval_ratio == 1 / 2
    assert stats.effective_budget == (2 + 3 + 4 + 5) / 4
    assert stats.attended_fraction == pytest.approx((2 / 4 + 3 / 5 + 1 + 1) / 4, rel=1e-12)
    # K and V of what is kept; 4 keys scanned; one gate of two anchor queries. Dense reads K and V of 18
    assert stats.kv_bytes_read == pytest.approx((2 * 14 + 4 + 2) / (2 * 18), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "bytes_per_position"), [("exact", 256), ("int8", 132), ("fp8", 132), ("int4", 68)]
)
def test_a_scan_of_a_copy_costs_its_bytes(kind: str, bytes_per_position: int) -> None:
    """head_dim 128 in a 16-bit cache: 256 bytes per key."""
    params = SelectorParams(1, 1, 1, 128, key_copy=KeyCopyKind(kind))
    visible = torch.ones(1, 1, 10, dtype=torch.bool)
    kept, yes, no = torch.zeros(1, 1, 1, 10, dtype=torch.bool), flags([1]), flags([0])
    stats = DecodeStats()
    stats.add(kept, visible, visible, Selection(kept, yes, yes, no), 1, params.scan_row)
    assert stats.kv_bytes_read == pytest.approx(10 * bytes_per_position / (2 * 10 * 256), rel=1e-12)


def test_a_window_narrows_the_scan_but_not_what_dense_reads() -> None:
    visible = torch.ones(1, 1, 10, dtype=torch.bool)
    allowed = visible.clone()
    allowed[..., 2:6] = False
    kept = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
    kept[..., [0, 9]] = True
    stats = DecodeStats()
    yes, no = flags([1]), flags([0])
    stats.add(kept, visible, allowed, Selection(kept, retrieved=yes, contested=yes, gated=no), group=1)
    assert stats.kv_bytes_read == (2 * 2 + 6) / (2 * 10)
    assert stats.attended_fraction == 2 / 10


def test_no_contest_means_no_ratio() -> None:
    stats = DecodeStats()
    assert all(math.isnan(value) for value in stats.to_dict().values())
    visible = torch.ones(1, 1, 3, dtype=torch.bool)
    stats.add(visible[:, None], visible, visible, None, group=1)
    assert math.isnan(stats.retrieval_ratio)
    assert stats.to_dict() == pytest.approx(
        {
            "retrieval_ratio": math.nan,
            "effective_budget": 3,
            "attended_fraction": 1,
            "kv_bytes_read": 1,
        },
        nan_ok=True,
    )


def test_per_step_top_k_of_a_model_by_hand() -> None:
    """Every step of every head keeps 2 sinks, 4 local and 3 chosen, and scans all of its context."""
    model = exact_model("llama")
    params = selector_params(
        model.config, time={"budget_tokens": 3, "gate": Gate.NEVER, "dilation": 0}
    )  # fmt: skip
    _, stats = decode_steps(model, random_tokens(30), 25, params)
    lengths = range(26, 31)
    assert stats.units == 5 * 4 * 2
    assert stats.retrieval_ratio == 1
    assert stats.effective_budget == 9
    assert stats.attended_fraction == pytest.approx(sum(9 / n for n in lengths) / 5, rel=1e-12)
    assert stats.kv_bytes_read == pytest.approx(
        sum(2 * 9 + n for n in lengths) / sum(2 * n for n in lengths), rel=1e-12
    )


def test_sharing_as_often_as_possible_by_hand() -> None:
    """Blocks of 4 with an open gate: anchors at steps 0 and 4; reused sets grow by a position per step."""
    model = exact_model("llama")
    params = selector_params(
        model.config, time={"budget_tokens": 3, "tau_cos": -1.0, "block": 4, "dilation": 0}
    )
    _, stats = decode_steps(model, random_tokens(31), 25, params)
    assert stats.retrieval_ratio == 2 / 6
    assert stats.effective_budget == (9 + 10 + 11 + 12 + 9 + 10) / 6
    rows = 2 * (9 + 10 + 11 + 12 + 9 + 10) + 26 + 30 + 4 * 2  # two scans, four gates of a group of two
    assert stats.kv_bytes_read == pytest.approx(rows / sum(2 * n for n in range(26, 32)), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_runs_are_counted_too(variant: str) -> None:
    """In padded batches, over the model's own window."""
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    lengths, steps = [30, 12], 3
    with sparse_attention(model, dense_params(model.config)) as cache:
        feed(model, cache, [random_tokens(n) for n in lengths], [random_tokens(steps)] * 2)
    seen = []
    for layer in range(4):
        windowed = "sliding_window" in overrides and layer >= overrides.get("max_window_layers", 0)
        for n in lengths:
            seen += [min(n + step, 20) if windowed else n + step for step in range(1, steps + 1)]
    assert cache.stats.units == 2 * len(seen)
    assert cache.stats.effective_budget == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    assert cache.stats.attended_fraction == cache.stats.kv_bytes_read == 1


def test_merging_two_runs_adds_their_sums() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time={"budget_tokens": 3, "tau_cos": 0.1})
    runs = [decode_steps(model, random_tokens(40, seed), 25 + seed, params)[1] for seed in (0, 1)]
    both = runs[0].merged(runs[1])
    assert both.units == runs[0].units + runs[1].units
    budget = sum(run.effective_budget * run.units for run in runs) / both.units
    assert both.effective_budget == pytest.approx(budget, rel=1e-12)
    low, high = sorted(run.retrieval_ratio for run in runs)
    assert low <= both.retrieval_ratio <= high

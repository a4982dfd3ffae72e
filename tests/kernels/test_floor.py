"""Where sparse attention can gain, and what fits into memory: both are known before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_kernels.errors import ResourceError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.params import DepthParams
from prhs_kernels.runtime import attach, decode, memory
from prhs_kernels.runtime.decode import Generation, generate_tokens
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.runtime.floor import (
    CHOOSING_SECONDS,
    DENSE_LAUNCHES,
    SECONDS_PER_LAUNCH,
    SHARING_SECONDS,
    memory_bandwidth,
    sparse_layer_seconds,
    step_floor,
)
from prhs_kernels.runtime.memory import Needed, RunShape, check_fits, engine_bytes, largest_fitting
from prhs_kernels.testing.allocations import allocations
from prhs_kernels.testing.inputs import random_tokens, selector_params
from prhs_kernels.testing.models import tiny_config, tiny_model

LARGE = tiny_config(
    "llama", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
)
C_1024 = selector_params(LARGE, time={"budget_tokens": 1024 - 36, "dilation": 0}, num_sinks=4, num_local=32)
H200 = {"itemsize": 2, "bandwidth": 4.3e12}


def test_floors_are_bytes_and_stages() -> None:
    found = step_floor(C_1024, batch=16, kv_len=32768, retrieval_ratio=1 / 8, **H200)
    rows = 32 * 16 * 8
    dense = 512 * rows * 32768 / 4.3e12
    sparse = rows * (516 * 1024 + 32768 / 8 * (256 + 4 * 12)) / 4.3e12
    assert found.dense == pytest.approx(dense + 32 * DENSE_LAUNCHES * SECONDS_PER_LAUNCH)
    assert found.sparse == pytest.approx(sparse + 32 * (SHARING_SECONDS + CHOOSING_SECONDS))
    assert found.dense > 5 * found.sparse
    shared = step_floor(C_1024, batch=16, kv_len=32768, retrieval_ratio=0.0, **H200)
    assert shared.sparse == pytest.approx(rows * 516 * 1024 / 4.3e12 + 32 * SHARING_SECONDS)
    int4 = dataclasses.replace(C_1024, key_copy=KeyCopyKind.INT4)
    copied = step_floor(int4, batch=16, kv_len=32768, retrieval_ratio=1 / 8, **H200)
    assert found.sparse - copied.sparse == pytest.approx(rows * 32768 / 8 * (256 - 68) / 4.3e12)
    windowed = step_floor(C_1024, batch=16, kv_len=32768, windows=[4096] * 32, **H200)
    assert windowed.dense == pytest.approx(dense / 8 + 32 * DENSE_LAUNCHES * SECONDS_PER_LAUNCH)


@pytest.mark.parametrize(
    ("batch", "kv_len", "gains"),
    [
        (1, 1024, False),
        (1, 4096, False),
        (1, 8192, False),
        (1, 131072, True),
        (8, 4096, False),
        (8, 32768, True),
        (64, 8192, True),
    ],
)
def test_where_sparse_attention_gains(batch: int, kv_len: int, gains: bool) -> None:
    assert step_floor(C_1024, batch=batch, kv_len=kv_len, **H200).gains is gains


def measured_layers() -> list[Any]:
    """Layers on an H200: what, parameters, rows, kept, positions, ρ, whether in blocks, µs."""
    path = Path(__file__).parents[2] / "docs" / "benchmarks" / "h200-operators.json"
    cases = []
    for row in json.loads(path.read_text())["data"]["rows"]:
        times, problem, name = row["timing"], row["problem"], row["case"]
        found = re.fullmatch(r"layer, ρ = ([\d.]+)(, in blocks of \d+)?(, int4 keys)?", name)
        if found is None:
            continue
        config = tiny_config(
            "llama",
            num_attention_heads=problem["num_qo_heads"],
            num_key_value_heads=problem["num_kv_heads"],
            head_dim=problem["head_dim"],
        )
        kind = KeyCopyKind.INT4 if found[3] else KeyCopyKind.EXACT
        sizes = (problem["batch"] * problem["num_kv_heads"], row["values"]["mean_kept"], problem["n"])
        share, block = row["values"]["retrieval_ratio"], bool(found[2])
        cases.append((name, selector_params(config, key_copy=kind), *sizes, share, block, times["p50"]))
    return cases


def test_layers_take_what_was_measured() -> None:
    cases = measured_layers()
    assert len(cases) == 28
    for name, params, rows, kept, positions, share, block, measured in cases:
        sizes: dict[str, Any] = {"rows": rows, "kept": kept, "itemsize": 2, "bandwidth": 4.25e12}
        expected = sparse_layer_seconds(params, scanned=0 if block else share * positions, **sizes)
        if block:  # all rows in the first step of a block, none in the others
            everyone = sparse_layer_seconds(params, scanned=positions, **sizes)
            expected += share * (everyone - expected)
        assert expected == pytest.approx(1e-6 * measured, rel=0.20 if positions < 16384 else 0.06), name


def test_dense_parameters_never_gain_and_windows_do() -> None:
    sizes = {"batch": 16, "kv_len": 32768, **H200}
    everything = selector_params(LARGE, time={"budget_ratio": 1.0})
    assert not step_floor(everything, **sizes).gains
    assert step_floor(selector_params(LARGE, depth=DepthParams(0, 0.2)), **sizes).gains


def test_generation_falls_back_only_when_allowed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    params = selector_params(model.config, time={"budget_tokens": 4, "tau_cos": 0.1})
    settings: dict[str, Any] = {"max_new_tokens": 3, "mode": "released"}
    prompts = [random_tokens(40)]
    runs = [Generation(), Generation(), Generation()]
    list(generate_tokens(model, prompts, params, run=runs[0], **settings))
    list(generate_tokens(model, prompts, params, run=runs[1], dense_fallback=True, **settings))
    monkeypatch.setattr(decode, "memory_bandwidth", lambda _: 1e3)  # bytes are all that counts
    list(generate_tokens(model, prompts, params, run=runs[2], dense_fallback=True, **settings))
    assert [run.attention for run in runs] == ["sparse", "dense", "sparse"]
    said = [[note for note in run.notes if note.startswith("dense attention")] for run in runs]
    assert [len(notes) for notes in said] == [0, 1, 0]
    assert [len(run.notes) for run in runs] == [1, 2, 1], "besides, that nothing is released"
    assert "at batch 1 and 43 positions" in said[1][0]
    assert runs[1].stats.attended_fraction == 1.0 > runs[0].stats.attended_fraction


def test_bandwidth_of_a_cpu_is_a_guess() -> None:
    assert memory_bandwidth(torch.device("cpu")) == 2e12


def test_largest_fitting() -> None:
    for limit in range(12):
        assert largest_fitting(lambda size: 3 * size + 1, 10, limit) == max(0, min(10, (limit - 1) // 3))


def test_a_run_that_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = RunShape.of(LARGE, C_1024, [None] * 32, torch.bfloat16)
    needed = lambda batch, length: engine_bytes(shape, batch, length)  # noqa: E731
    check_fits(needed, 16, 32768, None)
    check_fits(needed, 16, 32768, needed(16, 32768).most)
    with pytest.raises(ResourceError) as caught:
        check_fits(needed, 16, 32768, 40 * 2**30)
    longest = largest_fitting(lambda n: needed(16, n).most, 32768, 40 * 2**30)
    assert f"{needed(16, 32768).most / 2**30:.1f} GiB needed, 40.0 GiB free" in str(caught.value)
    assert f"what fits: {longest} positions at batch 16 or batch 9 at 32768 positions" in str(caught.value)
    with pytest.raises(ResourceError, match="nothing would fit"):
        check_fits(needed, 16, 32768, 0)
    model: Any = tiny_model("llama")
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**28)
    opened = DecodeEngine(model, selector_params(model.config), batch_size=2, max_len=128)
    with pytest.raises(ResourceError, match="batch 2 x 128 positions"), opened:
        pass


def test_the_activations_of_a_prefill_are_named_and_shrink_with_what_fits() -> None:
    shape = RunShape.of(LARGE, C_1024, [None] * 32, torch.bfloat16)

    def needed(batch: int, length: int) -> Needed:
        return engine_bytes(shape, batch, length, max(0, length - 100))

    # a model whose activations are small next to its cache: 96 wide, against 32 layers of 8 heads of 128
    assert needed(4, 9000).activations == 4 * 8900 * 2 * (3 * 64 + 2 * 128 + 4 * 4096 + 2 * 1024)
    assert needed(4, 9000).prefill > needed(4, 9000).decode > needed(4, 9000).prefill - 4 * 8900 * 2 * 19_000
    with pytest.raises(
        ResourceError, match=r"GiB \(1\.3 of them for the prefill's activations\) needed, 4.0 GiB"
    ):
        check_fits(needed, 4, 9000, 4 * 2**30)
    without = engine_bytes(shape, 4, 9000)
    with pytest.raises(ResourceError, match=r"GiB needed, 4\.0 GiB free; what fits: \d+ positions"):
        check_fits(lambda batch, length: engine_bytes(shape, batch, length), 4, 9000, 4 * 2**30)
    assert without.activations == 0 and without.prefill < without.decode


@pytest.mark.parametrize(
    ("overrides", "part", "most"),
    [
        ({"intermediate_size": 512}, 2**14, 1.02),
        ({}, 2**14, 1.02),
        ({"hidden_size": 256}, 2**14, 1.05),
        ({"num_attention_heads": 16, "num_key_value_heads": 8}, 2**14, 1.15),
        ({"intermediate_size": 512}, 300, 1.02),
        ({"intermediate_size": 512}, 100, 1.10),
    ],
)
def test_the_estimate_of_a_prefill_is_what_it_takes(
    overrides: dict[str, int],
    part: int,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The allocator's peak of a prefill, where the MLP is the widest, or the norms, or queries and keys."""
    monkeypatch.setattr(attach, "MLP_TOKENS", part)
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # a CPU's attention has a buffer for each, which no estimate for a GPU knows of
    model: Any = tiny_model("llama", max_position_embeddings=2048, **overrides)
    ids = torch.tensor([random_tokens(1000)])
    settings: dict[str, int] = {"batch_size": 1, "max_len": 1100, "prompt_len": 1000}
    with DecodeEngine(model, selector_params(model.config), **settings) as opened:
        opened.prefill(ids, torch.ones_like(ids))
        opened.cache.keys, opened.cache.values = [], []
        measured = allocations(lambda: opened.prefill(ids, torch.ones_like(ids))).peak
        needed = opened.memory.needed(1, 1100)
    held = 2**28 + 1100 * 16 * 4
    assert needed.decode < needed.prefill
    assert measured / most < needed.prefill - held < measured * most


def test_the_estimate_is_what_is_allocated() -> None:
    """Cache, sets and scratch of an engine, counted in its tensors."""
    model: Any = tiny_model("llama", head_dim=64)
    params = selector_params(model.config, time={"budget_tokens": 4, "gate": 0})
    with DecodeEngine(model, params, batch_size=2, max_len=4096) as opened:
        opened.fill_random(100, seed=0)
        states = [tensor for state in opened.sets.states.values() for tensor in vars(state).values()]
        held = opened.resident_bytes + sum(tensor.nbytes for tensor in states)
        scratch = 2 * 2 * 4096 * (4 * 2 + 4 + 1)
        estimate = opened.memory.needed(2, 4096).decode - 2**28 - scratch - 4096 * 64 * 4
        assert estimate == pytest.approx(held, rel=0.002)

"""Posterior bias on planted attention with a known answer, on broken selectors and on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prhs_calibration.corpus import Prompt
from prhs_calibration.evaluation.comparison import Settings, compare
from prhs_calibration.evaluation.fitting import sample_layers
from prhs_calibration.evaluation.matching import match_budgets
from prhs_calibration.evaluation.open_loop import decode_rows, prehoc_sets, steps_since_retrieval
from prhs_calibration.evaluation.points import BASELINES, COMPARED, DEFAULTS
from prhs_calibration.evaluation.tally import distance_bin, interval, num_distance_bins
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import DepthParams, Gate, SelectorParams, TimeParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors.baselines import Baseline, OracleTopK, uniform_size
from prhs_kernels.testing.models import tiny_model

LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
STEPS, LENGTH = 8, 200
PLANTED, PLANTED_MASS = 60, 0.5  # a middle position that neither sinks nor a local window reach


@dataclasses.dataclass
class FakePrompt:
    seed: int
    input_ids: list[int] = dataclasses.field(default_factory=lambda: [0] * LENGTH)
    text_hash: str = "hash"


@dataclasses.dataclass
class FakeSets:
    kept: torch.Tensor
    retrieved: torch.Tensor
    contested: torch.Tensor
    rows_read: torch.Tensor


@dataclasses.dataclass
class FakeParams:
    """A dial that stands for itself."""

    dial: float
    num_layers: int = LAYERS
    num_qo_heads: int = QO_HEADS
    num_kv_heads: int = KV_HEADS


def planted(prompt: Any, observer: Callable[[LayerObservation], None]) -> None:
    """Layer 0: half of the mass on `PLANTED`, the rest random. Layer 1: all of it on the newest key."""
    generator = torch.Generator().manual_seed(prompt.seed)
    positions = torch.arange(LENGTH - STEPS, LENGTH)
    visible = torch.arange(LENGTH) <= positions[:, None]
    for layer in range(LAYERS):
        noise = torch.rand(QO_HEADS, STEPS, LENGTH, generator=generator) * visible
        noise[..., PLANTED] = 0
        probs = noise / noise.sum(-1, keepdim=True) * (1 - PLANTED_MASS)
        probs[..., PLANTED] = PLANTED_MASS
        if layer == 1:
            probs = torch.nn.functional.one_hot(positions, LENGTH).float().expand(QO_HEADS, -1, -1)
        query = torch.randn(1, QO_HEADS, STEPS, HEAD_DIM, generator=generator)
        keys = torch.randn(1, KV_HEADS, LENGTH, HEAD_DIM, generator=generator)
        nothing = torch.zeros(KV_HEADS, STEPS, dtype=torch.bool)
        observer(
            LayerObservation(
                layer=layer,
                query=query,
                query_pre=query,
                keys=keys,
                values=keys,
                positions=positions,
                scale=1.0,
                dense_probs=probs,
                sparse_probs=probs,
                visible=visible,
                kept=visible.expand(KV_HEADS, -1, -1),
                retrieved=nothing,
                contested=nothing,
            )
        )


def perfect(seen: LayerObservation, params: Any) -> FakeSets:
    """The oracle's set at the dial. Matching passes no probabilities: there the size must do."""
    if not seen.dense_probs.numel():
        probs = seen.visible.float() / seen.visible.sum(-1, keepdim=True)
        seen = dataclasses.replace(seen, dense_probs=probs.expand(QO_HEADS, -1, -1))
    rows = decode_rows(seen)
    best = OracleTopK().select(rows, uniform_size(rows, params.dial))
    every = torch.ones(best.kept.shape[:2], dtype=torch.bool)
    return FakeSets(best.kept, every, every, best.rows_read)


def without_planted(seen: LayerObservation, params: Any) -> FakeSets:
    """Broken: like `perfect`, but never keeps the planted position."""
    sets = perfect(seen, params)
    sets.kept[..., PLANTED] = False
    return sets


def run(
    prehoc: Any = perfect, *, count: int = 3, replay: Any = planted, lowest: float = 0.01, **settings: Any
) -> dict[str, Any]:
    prompts: list[Any] = [FakePrompt(seed) for seed in range(count)]
    dials: Any = FakeParams
    result = compare(prompts, replay, dials, lowest, Settings(**settings), prehoc=prehoc)
    json.dumps(result, allow_nan=False)
    return result


def cell(result: dict[str, Any], selector: str, budget: float) -> dict[str, Any]:
    return next(c for c in result["cells"] if c["selector"] == selector and c["budget"] == budget)


def test_planted_bias_of_streaming_is_found_where_it_is() -> None:
    found = cell(run(), "streaming-llm", 1 / 8)
    layer_zero, layer_one = found["by_layer"]["excess"]["mean"]
    # the oracle has the planted position and beats random noise; streaming misses it in layer 0 only
    assert PLANTED_MASS <= layer_zero <= PLANTED_MASS + 0.13
    assert layer_one == pytest.approx(0, abs=1e-6)
    assert found["excess"]["mean"] == pytest.approx((layer_zero + layer_one) / 2)
    missed = np.array(found["by_position"]["missed_mass"]["mean"])
    assert int(missed.argmax()) == math.floor(20 * PLANTED / LENGTH)
    assert missed.max() == pytest.approx(PLANTED_MASS / 2, abs=0.01)
    distance = np.array(found["by_distance"]["missed_mass"]["mean"])
    assert int(distance.argmax()) == int(distance_bin(torch.tensor(LENGTH - PLANTED)))
    assert missed.sum() == pytest.approx(distance.sum())


def test_oracle_has_no_bias_and_no_selector_less() -> None:
    result = run()
    for budget in result["budgets"]:
        best = cell(result, "oracle", budget)
        assert best["excess"]["mean"] == 0 and best["miss_rate"]["mean"] == 0
        assert best["dropped_mass"]["mean"] == best["uniform_oracle_dropped_mass"]["mean"]
        for name in DEFAULTS:
            assert min(cell(result, name, budget)["by_layer"]["excess"]["mean"]) >= -1e-6


def test_perfect_prehoc_is_unbiased_and_a_broken_one_shows() -> None:
    good, bad = (cell(run(prehoc), "prhs", 1 / 8) for prehoc in (perfect, without_planted))
    assert good["excess"]["mean"] == pytest.approx(0, abs=1e-6)
    # layer 0 loses the planted half of the mass; the oracle of that size has it
    assert bad["by_layer"]["excess"]["mean"][0] == pytest.approx(PLANTED_MASS, abs=0.02)
    assert bad["excess"]["low"] > 0.2
    assert bad["worst_head"]["layer"] == 0 and bad["worst_head"]["dropped_mass"] > PLANTED_MASS


def test_all_selectors_spend_the_same_budget() -> None:
    result = run()
    assert [match["reached"] for match in result["matching"]] == [True] * 3
    for entry in result["cells"]:
        # 12 positions are less than a page
        assert entry["attended_fraction"] == pytest.approx(
            entry["budget"], rel=0.2 if entry["selector"] == "quest" else 0.05
        )
    # a sixteenth of 200 positions cannot be had to 2 %
    assert all(cell(result, name, 1 / 8)["matched"] for name in ("prhs", "oracle", "streaming-llm"))


def test_budget_out_of_reach_is_said() -> None:
    result = run(lowest=0.2)
    assert [match["reached"] for match in result["matching"]] == [False, False, True]
    assert [cell(result, "prhs", budget)["matched"] for budget in result["budgets"]] == [False, False, True]


def test_bytes_read_count_the_scan() -> None:
    result = run()
    # K and V of an eighth, and one scan of K for the oracle; streaming reads no more than it keeps
    assert cell(result, "oracle", 1 / 8)["kv_bytes_read"] == pytest.approx(1 / 8 + 1 / 2, rel=0.02)
    assert cell(result, "streaming-llm", 1 / 8)["kv_bytes_read"] == pytest.approx(1 / 8, rel=0.02)
    quest = cell(result, "quest", 1 / 8)
    assert quest["kv_bytes_read"] == pytest.approx(quest["attended_fraction"] + 1 / 16, rel=0.1)


def test_every_prompt_counts() -> None:
    one, three = run(count=1), run(count=3)
    assert cell(one, "quest", 1 / 4)["excess"]["mean"] != cell(three, "quest", 1 / 4)["excess"]["mean"]
    assert cell(one, "quest", 1 / 4)["excess"]["low"] is None
    assert run(count=3) == three


def test_steps_since_retrieval() -> None:
    retrieved = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    assert steps_since_retrieval(retrieved).tolist() == [[0, 1, 2, 0, 1], [-1, -1, 0, 1, 2]]
    assert steps_since_retrieval(retrieved[:, :0]).shape == (2, 0)


def test_bias_by_steps_since_retrieval() -> None:
    def stale(seen: LayerObservation, params: Any) -> FakeSets:
        """Good at retrievals (every fourth step), without the planted position in between."""
        good, bad = perfect(seen, params), without_planted(seen, params)
        fresh = torch.arange(STEPS) % 4 == 0
        kept = torch.where(fresh[:, None], good.kept, bad.kept)
        return dataclasses.replace(good, kept=kept, retrieved=fresh.expand(KV_HEADS, -1))

    found = cell(run(stale), "prhs", 1 / 8)
    lags = found["by_steps_since_retrieval"]
    assert found["retrieval_ratio"] == 0.25
    assert lags["units"][:5] == [3 * LAYERS * KV_HEADS * 2] * 4 + [0]
    assert lags["excess"][0] == pytest.approx(0, abs=1e-6) and lags["excess"][4] is None
    assert all(value > 0.2 for value in lags["excess"][1:4])


def test_interval_is_student_t() -> None:
    found = interval(np.array([[0.1, 1.0], [0.3, 1.0]]), 0.95)
    assert found["mean"] == pytest.approx([0.2, 1.0])
    assert found["high"] == pytest.approx(
        [0.2 + 12.7062 * 0.1, 1.0], rel=1e-4
    )  # t(0.975, 1 degree of freedom)


def test_distance_bins() -> None:
    assert distance_bin(torch.tensor([-3, 0, 1, 2, 3, 4, 1023, 1024])).tolist() == [0, 0, 1, 2, 2, 3, 10, 11]
    assert int(distance_bin(torch.tensor(1024))) == num_distance_bins(1025) - 1
    assert int(distance_bin(torch.tensor(1023))) == num_distance_bins(1024) - 1


@pytest.mark.parametrize(
    "curve", [lambda x: x, lambda x: x**3, lambda x: x**0.2, lambda x: math.floor(64 * x) / 64]
)
def test_matching_finds_the_budget_on_bent_curves(curve: Callable[[float], float]) -> None:
    asked: list[float] = []

    def measure(dial: float) -> float:
        asked.append(dial)
        return curve(dial)

    matches = match_budgets(measure, (1 / 16, 1 / 8, 1 / 4), 1e-6)
    assert [match.reached for match in matches] == [True] * 3
    assert all(curve(match.dial) == match.attended_fraction for match in matches)
    assert len(asked) == len(set(asked)) and len(asked) <= 40


def test_matching_says_what_is_out_of_reach() -> None:
    jump = match_budgets(lambda dial: 0.1 if dial < 0.5 else 0.9, (0.05, 0.4), 0.1)
    assert [match.reached for match in jump] == [False, False]


@pytest.mark.parametrize(
    "settings",
    [
        {"selectors": ("h3o",)},
        {"selectors": ()},
        {"budgets": (0.0,)},
        {"budgets": (1.0,)},
        {"confidence": 1.0},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**settings)


def test_no_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="no prompts"):
        run(count=0)


def family(model: Any, *, depth: bool = True) -> Callable[[float], SelectorParams]:
    """A dial for a tiny model: one budget for all heads, sharing by cosine, a window in the upper layers."""
    base = dataclasses.replace(dense_params(model.config), num_sinks=1, num_local=2)
    shape = (base.num_layers, base.num_kv_heads)

    def at(dial: float) -> SelectorParams:
        if dial >= 1:
            return base
        time = TimeParams(
            budget_ratio=torch.full(shape, dial),
            budget_tokens=torch.zeros(shape, dtype=torch.int32),
            gate=torch.full(shape, int(Gate.POST_ROPE), dtype=torch.uint8),
            tau_cos=torch.full(shape, -0.2),
            block=torch.full(shape, 4, dtype=torch.int32),
            dilation=torch.ones(shape, dtype=torch.int32),
        )
        return dataclasses.replace(base, time=time, depth=DepthParams(1, 0.5) if depth else None)

    return at


def replay_of(model: Any) -> Callable[[Any, Callable[[LayerObservation], None]], None]:
    dense = dense_params(model.config)

    def replay(prompt: Any, observer: Callable[[LayerObservation], None]) -> None:
        tokens = torch.randint(4, 128, (120,), generator=torch.Generator().manual_seed(prompt.seed)).tolist()
        Scorer(model, tokens, 90, keep_queries=True).run(dense, observer)

    return replay


@pytest.mark.parametrize("window", [None, 50])
def test_open_loop_sets_are_those_of_the_runtime(window: int | None) -> None:
    # in a model of one layer open and closed loop are the same thing
    model = tiny_model("mistral", num_hidden_layers=1, sliding_window=window)
    params = family(model, depth=False)(0.1)
    opened: list[Any] = []
    replay_of(model)(FakePrompt(0), lambda seen: opened.append(prehoc_sets(seen, params)))
    closed: list[LayerObservation] = []
    tokens = torch.randint(4, 128, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    result = Scorer(model, tokens, 90).run(params, closed.append)
    for name in ("kept", "retrieved", "contested"):
        assert torch.equal(getattr(opened[0], name), getattr(closed[0], name))
    assert float(opened[0].rows_read.sum()) == float(result.stats.rows_read)
    assert not bool(opened[0].retrieved.all())  # something was shared


@pytest.mark.parametrize("window", [None, 50])
def test_tiny_model_end_to_end(window: int | None) -> None:
    model = tiny_model("mistral", sliding_window=window)
    prompts: list[Any] = [FakePrompt(seed) for seed in range(2)]
    result = compare(prompts, replay_of(model), family(model), 0.01, Settings(budgets=(0.25, 0.5)))
    json.dumps(result, allow_nan=False)
    assert len(result["cells"]) == 2 * len(DEFAULTS) and result["num_steps"] == 60
    for match in result["matching"]:
        # under a window every step has the same few positions, so budgets come in whole ones
        step = 0.0 if window is None else 1 / window
        assert match["reached"] or abs(match["attended_fraction"] - match["budget"]) < step
    for entry in result["cells"]:
        assert entry["attended_fraction"] == pytest.approx(entry["budget"], rel=0.1)
        assert min(entry["by_layer"]["excess"]["mean"]) >= -1e-6
        total = sum(entry["by_position"]["missed_mass"]["mean"])
        assert (
            total >= entry["excess"]["mean"] - 1e-6
        )  # what replaced the missed mass only makes up for some of it
    assert 0 < cell(result, "prhs", 0.25)["retrieval_ratio"] < 1


def fitted_methods(model: Any) -> dict[str, Baseline]:
    tokens = torch.randint(4, 128, (100,), generator=torch.Generator().manual_seed(7)).tolist()
    samples = [sample_layers(model, Prompt(tokens, 70, "text", "hash"))]
    return {name: method.fitted(samples) for name, method in BASELINES.items()}


def test_every_method_at_matched_and_published_budgets() -> None:
    model = tiny_model("llama")
    prompts: list[Any] = [FakePrompt(seed) for seed in range(2)]
    names = tuple(name for name in COMPARED if name != "prhs")
    settings = Settings(selectors=names, budgets=(0.3,), published=True)
    methods = fitted_methods(model)
    result = compare(prompts, replay_of(model), family(model), 0.01, settings, methods=methods)
    json.dumps(result, allow_nan=False)
    assert [entry["selector"] for entry in result["cells"]] == list(names)
    for entry in result["cells"]:
        # 90 to 119 positions; whole pages of 16
        allowed = 0.05 if entry["selector"] == "quest" else 0.02
        assert entry["attended_fraction"] == pytest.approx(0.3, rel=allowed), entry["selector"]
        searched = not BASELINES[entry["selector"]].exact
        assert (entry["dial"] is not None) == searched == (entry["selector"] in result["dials"])
        assert 0 <= entry["miss_rate"]["mean"] < 1 and entry["kv_bytes_read"] > 0
    expected = [(name, str(own)) for name in names for own in methods[name].published]
    found = [(entry["selector"], entry["published"]) for entry in result["published"]]
    assert found == expected and len(found) >= len(names) - 1
    assert all(entry["budget"] is None and entry["matched"] is None for entry in result["published"])


def test_methods_remember_within_a_prompt_only() -> None:
    """The figures of two prompts are those of each alone."""
    model = tiny_model("llama")
    settings = Settings(selectors=("h2o",), budgets=(0.2,))
    one, other = FakePrompt(1), FakePrompt(2)
    runs = ([one], [other], [one, other], [other, one])
    cells: list[dict[str, Any]] = [
        compare(prompts, replay_of(model), family(model), 0.01, settings)["cells"][0] for prompts in runs
    ]
    figures = [found["dropped_mass"]["mean"] for found in cells]
    assert figures[2] == figures[3] == pytest.approx((figures[0] + figures[1]) / 2, rel=1e-12)
    assert figures[0] != figures[1]


def test_selector_names_are_those_of_the_methods() -> None:
    assert set(COMPARED) == set(BASELINES) | {"prhs"} and set(DEFAULTS) < set(COMPARED)
    assert all(method.name == name for name, method in BASELINES.items())

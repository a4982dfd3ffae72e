"""Accuracy in closed loop: scores against greedy decoding, intervals against planted truth, interruptions."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prhs_calibration.bundle import Bundle
from prhs_calibration.bundle_format import BundleMetadata
from prhs_calibration.evaluation import closed_loop, lm_harness, rows
from prhs_calibration.evaluation import evaluate as library
from prhs_calibration.evaluation.bootstrap import PairedBootstrap, average, interval
from prhs_calibration.evaluation.closed_loop import match_dials, run_points
from prhs_calibration.evaluation.evaluate import evaluate, open_store, outcome_of, steps_of
from prhs_calibration.evaluation.fitting import fitted
from prhs_calibration.evaluation.plan import Plan
from prhs_calibration.evaluation.points import BASELINES, COMPARED, Point, points
from prhs_calibration.evaluation.store import Store
from prhs_calibration.evaluation.tasks import TASKS, Example
from prhs_calibration.fingerprint import fingerprint_of
from prhs_calibration.models import LoadedModel
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import Gate
from prhs_kernels.runtime.decode import generate_tokens
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors.baselines import AtBudget, OracleTopK, StreamingLLM
from prhs_kernels.testing.inputs import random_tokens
from prhs_kernels.testing.models import tiny_model, tiny_tokenizer

LAYERS, KV_HEADS = 4, 2
PLAN = Plan(
    tasks=("single_needle", "perplexity"),
    lengths=(300,),
    selectors=("prhs", "oracle", "streaming-llm", "quest"),
    budgets=(1 / 4, 1 / 2),
    samples=3,
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = tiny_model("llama")
    return LoadedModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        model_id="tiny",
        revision="local",
        fingerprint=fingerprint_of(model.config),
        weights_hash="sha256:" + "0" * 64,
        tokenizer_hash="sha256:" + "1" * 64,
        context_length=512,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def make_bundle(loaded: LoadedModel, gate: Gate = Gate.POST_ROPE) -> Bundle:
    """Uniform budgets that are the dial itself; heads share nearly always."""
    dial = torch.tensor([0.02, 0.1, 0.3, 0.7, 1.0])

    def heads(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((LAYERS, KV_HEADS), value, dtype=dtype)

    tensors = {
        "time/lambda": dial,
        "time/budget_ratio": dial[:, None, None].expand(-1, LAYERS, KV_HEADS).contiguous(),
        "time/budget_tokens": torch.zeros(5, LAYERS, KV_HEADS, dtype=torch.int32),
        "time/gate": heads(gate, torch.uint8),
        "time/tau_cos": heads(0.2, torch.float32),
        "time/block": heads(8, torch.int32),
        "time/dilation": heads(1, torch.int32),
        "risk/loss": torch.linspace(0.2, 0, 5).expand(60, -1).contiguous(),
    }
    metadata = BundleMetadata(
        model_id="tiny",
        revision="local",
        fingerprint=loaded.fingerprint,
        weights_hash=loaded.weights_hash,
        tokenizer_hash=loaded.tokenizer_hash,
        corpus_hash="sha256:34",
        seeds={"corpus": 0},
        split_sizes={"fit": 8, "select": 60, "verify": 0},
        context_length=512,
        delta=0.2,
        dial_index=2,
        num_sinks=2,
        num_local=8,
    )
    return Bundle(metadata, tensors)


@pytest.fixture(scope="module")
def bundle(loaded: LoadedModel) -> Bundle:
    return make_bundle(loaded)


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "prhs" / "results" / "partial"


@pytest.fixture(scope="module")
def data(loaded: LoadedModel, bundle: Bundle) -> dict[str, Any]:
    return evaluate(loaded, bundle, PLAN, memory())


def memory() -> Store:
    """A store that is never written."""
    store = Store(Path("no such folder") / "store.json", {})
    store._write = lambda: None  # type: ignore[method-assign]
    return store


# --- scores ---


def test_every_answer_token_is_predicted_by_a_decode_step() -> None:
    example = Example([1, 2, 3], [4, 5], [6, 7], ("x",))
    assert steps_of(example) == ([1, 2, 3, 4, 5, 6], 3)
    assert steps_of(dataclasses.replace(example, question_ids=[])) == ([1, 2, 3, 6], 2), "3 predicts 6"
    assert steps_of(example, question_known=True) == ([1, 2, 3, 4, 5, 6], 4), "5 predicts 6"


@pytest.mark.parametrize("selector", ["dense", "prhs", "oracle", "streaming-llm"])
def test_correct_means_what_greedy_decoding_writes(
    loaded: LoadedModel, bundle: Bundle, selector: str
) -> None:
    """The answer that the decode loop writes is right, and a change of any token of it is wrong."""
    chosen = {"oracle": AtBudget(OracleTopK(), 0.2), "streaming-llm": AtBudget(StreamingLLM(), 0.2)}
    dense = closed_loop.dense_params(loaded.model.config)
    params = bundle.params(1) if selector == "prhs" else dense
    point = Point(selector, params, chooser=chosen.get(selector))
    for seed in range(3):
        context, question = random_tokens(90, seed=seed), random_tokens(7, seed=100 + seed)
        stream = generate_tokens(
            loaded.model,
            [[*context, *question]],
            params,
            max_new_tokens=5,
            selector=point.chooser,
            prompt_steps=len(question),
        )
        answer = [token[0] for token in stream if token[0] is not None]
        for position in (None, 0, 2, 4):
            changed = list(answer)
            if position is not None:
                changed[position] = 5 + (changed[position] + 1) % 100
            example = Example(context, question, changed, ())
            ((_, result),) = run_points(loaded.model, steps_of(example), [point])
            outcome = outcome_of(result, changed)
            assert outcome["correct"] == (position is None)
            assert outcome["tokens"] == 5


def test_likelihood_is_that_of_the_stock_model(loaded: LoadedModel) -> None:
    example = Example(random_tokens(50), random_tokens(4, seed=1), random_tokens(9, seed=2), ())
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([example.input_ids])).logits[0]
    chances = logits.log_softmax(-1)[53:62].gather(-1, torch.tensor(example.answer_ids)[:, None])
    point = Point("dense", closed_loop.dense_params(loaded.model.config))
    ((_, result),) = run_points(loaded.model, steps_of(example), [point])
    assert outcome_of(result, example.answer_ids)["nats"] == pytest.approx(-float(chances.sum()), rel=1e-5)


def outcome(correct: bool, nats: float, tokens: int = 2, **stats: float) -> dict[str, Any]:
    counts = {"units": 4.0, "kept": 40.0, "fraction": 1.0, "visible": 160.0, "rows_read": 100.0}
    shared = {"retrieved": 1.0, "contested": 4.0}
    sums = counts | shared | stats
    return {"correct": correct, "nats": nats, "tokens": tokens, "stats": sums, "backend": "reference"}


def table_of(metric: str, outcomes: list[dict[str, Any]], points: list[Point]) -> list[dict[str, Any]]:
    bootstrap = PairedBootstrap(len(outcomes), seed=(0,))
    cell = rows.Cell("task", metric, 64, bootstrap, 0.95)
    return [row for row, _ in cell.rows(points, outcomes)]


def test_rows_say_what_happened(loaded: LoadedModel) -> None:
    params = closed_loop.dense_params(loaded.model.config)
    chosen = [Point("dense", params), Point("prhs", params, budget=0.25, dial=0.3)]
    outcomes = [
        {"dense": outcome(True, 1.0), "prhs@0.25": outcome(True, 2.0)},
        {"dense": outcome(True, 1.0), "prhs@0.25": outcome(False, 4.0)},
    ]
    dense, sparse = table_of("exact", outcomes, chosen)
    assert dense["score"]["mean"] == 1 and dense["difference"] is None
    assert sparse["score"]["mean"] == 0.5 and sparse["difference"]["mean"] == -0.5
    assert sparse["nats_per_token"] == 6 / 4
    assert (sparse["effective_budget"], sparse["attended_fraction"]) == (10, 0.25)
    assert sparse["retrieval_ratio"] == 0.25 and sparse["kv_bytes_read"] == 200 / 640
    assert sparse["matched"] is True and dense["matched"] is None
    _, perplexity = table_of("likelihood", outcomes, chosen)
    assert perplexity["score"]["mean"] == pytest.approx(math.exp(1.5))
    assert perplexity["difference"]["mean"] == pytest.approx(math.exp(1.5) - math.exp(0.5))


def test_perplexity_weighs_tokens_not_items(loaded: LoadedModel) -> None:
    chosen = [Point("dense", closed_loop.dense_params(loaded.model.config))]
    outcomes = [{"dense": outcome(True, 10.0, 1)}, {"dense": outcome(True, 2.0, 3)}]
    assert table_of("likelihood", outcomes, chosen)[0]["score"]["mean"] == pytest.approx(math.exp(12 / 4))


def test_a_run_that_never_shared_is_an_error(loaded: LoadedModel) -> None:
    params = closed_loop.dense_params(loaded.model.config)
    chosen = [Point("dense", params), Point("prhs", params, budget=0.25)]
    outcomes = [{"dense": outcome(True, 1.0), "prhs@0.25": outcome(True, 1.0, retrieved=4.0)}]
    with pytest.raises(InputError, match=r"prhs@0.25 never reused a set on task at length 64"):
        table_of("exact", outcomes, chosen)
    outcomes = [{"dense": outcome(True, 1.0), "prhs@0.25": outcome(True, 1.0, retrieved=0.0, contested=0.0)}]
    with pytest.raises(InputError, match="never reused"):
        table_of("exact", outcomes, chosen)


def test_heads_that_never_share_are_found_in_a_real_run(loaded: LoadedModel) -> None:
    alone = make_bundle(loaded, Gate.NEVER)
    plan = dataclasses.replace(PLAN, selectors=("prhs",), tasks=("single_needle",), samples=1)
    with pytest.raises(InputError, match="never reused a set on single_needle at length 300"):
        evaluate(loaded, alone, plan, memory())


# --- intervals ---


def test_intervals_of_paired_differences_cover_the_truth() -> None:
    """400 planted tables: the share of 95 % intervals that hold the true difference, with binomial slack."""
    rng = np.random.default_rng(0)
    covered = unpaired = 0
    for run in range(400):
        easy = rng.random(60) < 0.6  # items both get right, which no difference should come from
        dense = (easy | (rng.random(60) < 0.3)).astype(float)
        sparse = (easy | (rng.random(60) < 0.1)).astype(float)
        truth = 0.4 * (0.1 - 0.3)
        bootstrap = PairedBootstrap(60, seed=(run,), resamples=400)
        found = interval(bootstrap.sample(sparse, np.ones(60), dense), 0.95, (-1, 1))
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= truth <= found["high"]
        other = PairedBootstrap(60, seed=(run, 1), resamples=400)
        ends = bootstrap.sample(sparse, np.ones(60)).resampled - other.sample(dense, np.ones(60)).resampled
        unpaired += np.ptp(np.quantile(ends, [0.025, 0.975])) > found["high"] - found["low"]
    assert (
        covered >= 400 * 0.95 - 4 * math.sqrt(400 * 0.95 * 0.05) - 6
    )  # percentile intervals are a bit short
    assert unpaired > 390, "pairing has to make intervals shorter"


def test_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).random(50)
    sample = PairedBootstrap(50, seed=(0,), resamples=20_000).sample(values, np.ones(50))
    assert sample.resampled.std() == pytest.approx(values.std() / math.sqrt(50), rel=0.03)
    assert sample.mean == pytest.approx(values.mean())


def test_seeded_and_the_same_items_for_everyone() -> None:
    values, weights = np.arange(8.0), np.ones(8)
    first, again = (PairedBootstrap(8, seed=(3, 1)).sample(values, weights).resampled for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, PairedBootstrap(8, seed=(3, 2)).sample(values, weights).resampled)
    shifted = PairedBootstrap(8, seed=(3, 1)).sample(values + 1, weights, values)
    assert shifted.constant and np.allclose(shifted.resampled, 1)


@pytest.mark.parametrize("count", [1, 4, 40])
def test_agreement_is_bounded_by_the_exact_binomial(count: int) -> None:
    """What Clopper and Pearson give for `count` successes out of `count`, from scipy."""
    from scipy.stats import binomtest

    bootstrap = PairedBootstrap(count, seed=(0,))
    ones, weights = np.ones(count), np.ones(count)
    exact = binomtest(count, count).proportion_ci(0.95, "exact")
    score = interval(bootstrap.sample(ones, weights), 0.95, (0, 1))
    assert (score["low"], score["high"]) == (pytest.approx(exact.low), 1)
    change = interval(bootstrap.sample(ones, weights, ones), 0.95, (-1, 1))
    assert (change["low"], change["high"]) == (pytest.approx(exact.low - 1), pytest.approx(1 - exact.low))
    unbounded = interval(bootstrap.sample(ones, weights, ones), 0.95)
    assert (unbounded["low"], unbounded["high"]) == (None, None)


def test_means_over_tasks_resample_within_tasks() -> None:
    first = PairedBootstrap(4, seed=(0,)).sample(np.array([0.0, 1, 1, 1]), np.ones(4))
    second = PairedBootstrap(2, seed=(1,)).sample(np.array([1.0, 1]), np.ones(2))
    both = average([first, second])
    assert both.mean == (0.75 + 1) / 2 and both.count == 6 and not both.constant
    assert np.allclose(both.resampled, (first.resampled + 1) / 2)


# --- dials ---


@pytest.mark.parametrize("budgets", [(0.25,), (1 / 8, 1 / 4, 1 / 2)])
def test_the_matched_dial_spends_the_budget_in_closed_loop(
    loaded: LoadedModel, bundle: Bundle, budgets: tuple[float, ...]
) -> None:
    prompts = [(random_tokens(300, seed=seed), 280) for seed in range(3)]
    for match in match_dials(loaded.model, bundle, prompts, budgets):
        assert match.reached
        params = bundle.params_at(match.dial)
        spent = [Scorer(loaded.model, *steps).run(params).stats.attended_fraction for steps in prompts]
        assert np.mean(spent) == pytest.approx(match.budget, rel=0.02)


def test_a_budget_below_the_lowest_dial_is_said_to_be_out_of_reach(
    loaded: LoadedModel, bundle: Bundle
) -> None:
    (match,) = match_dials(loaded.model, bundle, [(random_tokens(60), 50)], (0.01,))
    assert not match.reached and match.dial == pytest.approx(0.02)


def test_dials_of_methods_whose_size_is_not_their_setting(loaded: LoadedModel) -> None:
    prompts = [(random_tokens(300, seed=seed), 280) for seed in range(2)]
    store, asked = memory(), []

    def some() -> list[Any]:
        asked.append(1)
        return prompts

    model, names = loaded.model, ("oracle", "h2o", "snapkv")
    found = closed_loop.find_matches(model, None, names, (0.2,), some, store, "dials/x")
    assert list(found) == ["snapkv"]
    assert store.count("dials/x/snapkv") == 1
    run = points(model.config, None, names, (0.2,), found)
    spent = [
        [result.stats.attended_fraction for _, result in run_points(model, steps, run)] for steps in prompts
    ]
    assert np.mean(spent, axis=0) == pytest.approx([1, 0.2, 0.2, 0.2], rel=0.02)
    assert closed_loop.find_matches(model, None, names, (0.2,), some, store, "dials/x") == found
    assert len(asked) == 1


def test_methods_are_fitted_to_the_model_on_the_fit_split(loaded: LoadedModel) -> None:
    one, again, other = (fitted(loaded, COMPARED, context_length=200, seed=seed) for seed in (0, 0, 1))
    orders = [methods["double-sparse"].order for methods in (one, again, other)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert orders[0].shape == (LAYERS, KV_HEADS, 16) and one["kascade"] == again["kascade"]
    assert one["kascade"].anchors[0] == 0 and len(one["kascade"].anchors) == 2
    assert one["quest"] is BASELINES["quest"]
    assert fitted(loaded, ("oracle", "prhs"), context_length=200, seed=0) is BASELINES


def test_every_method_in_closed_loop(loaded: LoadedModel) -> None:
    names = ("double-sparse", "hshare", "tidal-decode", "kascade", "twilight")
    plan = Plan(("single_needle",), (300,), names, (1 / 4,), samples=1, published=True)
    rows_of = {row["point"]: row for row in evaluate(loaded, None, plan, memory())["rows"]}
    assert [row["selector"] for row in rows_of.values() if row["budget"]] == list(names)
    for name in names:
        assert rows_of[f"{name}@0.25"]["attended_fraction"] == pytest.approx(0.25, rel=0.05)
    ratios = {name: rows_of[f"{name}@0.25"]["retrieval_ratio"] for name in names}
    assert ratios == pytest.approx(
        {"double-sparse": 1, "hshare": 1 / 8, "tidal-decode": 1, "kascade": 1 / 2, "twilight": 1}, abs=0.01
    )
    assert rows_of["hshare@128"]["effective_budget"] == pytest.approx(128.5, abs=0.51)
    assert {"hshare@512", "twilight@p = 0.95", "kascade@10 % or 128"} <= rows_of.keys()


def test_publications_that_look_at_the_prompt_have_the_question_in_it(loaded: LoadedModel) -> None:
    example = Example(random_tokens(90), random_tokens(6, seed=1), random_tokens(3, seed=2), ())
    run = points(loaded.model.config, None, ("snapkv", "quest"), (), {}, published=True)
    run += points(loaded.model.config, None, ("h2o",), (0.5,), {}, published=True)[1:]
    steps = {
        name: outcome["stats"]["units"] / (LAYERS * KV_HEADS)
        for name, outcome in library._run(loaded, example, run, "reference")
    }
    # 6 of the question and 2 of the answer, or the last of the question and 2 of the answer
    assert steps == {"dense": 8, "quest@1024": 8, "h2o@0.5": 8, "snapkv@1024": 3, "h2o@20 % of the prompt": 3}


def test_published_points(loaded: LoadedModel) -> None:
    names = ("quest", "h2o", "oracle")
    found = points(loaded.model.config, None, names, (0.25,), {}, published=True)
    assert [point.name for point in found[1:]] == [
        "quest@0.25",
        "quest@1024",
        "h2o@0.25",
        "h2o@20 % of the prompt",
        "oracle@0.25",
    ]
    (_, result) = list(run_points(loaded.model, (random_tokens(100), 80), found))[4]
    # 16 of 81 to 100 positions
    fractions = [16 / visible for visible in range(81, 101)]
    assert result.stats.attended_fraction == pytest.approx(sum(fractions) / len(fractions), rel=1e-6)


def test_points_of_a_run(loaded: LoadedModel, bundle: Bundle) -> None:
    matches = match_dials(loaded.model, bundle, [(random_tokens(120), 100)], (0.25, 0.5))
    found = points(loaded.model.config, bundle, ("oracle", "prhs"), (0.25, 0.5), {"prhs": matches}, 0.2)
    names = ["dense", "oracle@0.25", "oracle@0.5", "prhs@0.25", "prhs@0.5", "prhs@δ=0.2"]
    assert [point.name for point in found] == names
    assert found[-1].dial == pytest.approx(float(bundle.dial[2]))


# --- whole runs ---


def test_a_run_has_every_row(data: dict[str, Any]) -> None:
    json.dumps(data, allow_nan=True)
    per_cell = 1 + 4 * 2
    assert len(data["rows"]) == 2 * per_cell and len(data["averages"]) == per_cell
    for row in data["rows"]:
        assert row["samples"] == 3 and row["length"] == 300
        if row["selector"] == "dense":
            assert row["attended_fraction"] == row["kv_bytes_read"] == 1
            continue
        assert row["difference"]["mean"] == pytest.approx(
            row["score"]["mean"] - score_of(data, row["task"], "dense"), abs=1e-9
        )
        assert row["attended_fraction"] == pytest.approx(row["budget"], rel=0.06)
        assert row["effective_budget"] < 300 * row["budget"] * 1.1
        assert row["kv_bytes_read"] >= row["attended_fraction"] * 0.9
        ratio = {"oracle": 1, "quest": 1, "streaming-llm": 0}.get(row["selector"])
        assert row["retrieval_ratio"] == ratio if ratio is not None else 0 < row["retrieval_ratio"] < 1
    assert len({row["nats_per_token"] for row in data["rows"]}) > 10, "selectors must make a difference"


def score_of(data: dict[str, Any], task: str, point: str) -> float:
    found = next(row for row in data["rows"] if row["task"] == task and row["point"] == point)
    return float(found["score"]["mean"])


def test_rows_can_be_repeated_by_hand(loaded: LoadedModel, data: dict[str, Any]) -> None:
    """One row from scratch: items by number, one scoring pass each."""
    row = next(row for row in data["rows"] if row["point"] == "oracle@0.25" and row["task"] == "perplexity")
    nats = tokens = kept = units = 0.0
    for number in range(3):
        item = TASKS["perplexity"].build(loaded.tokenizer, length=300, seed=number, templates="seen")
        assert len(item.input_ids) == 300
        dense = closed_loop.dense_params(loaded.model.config)
        result = Scorer(loaded.model, *steps_of(item)).run(dense, None, AtBudget(OracleTopK(), 0.25))
        chances = result.logits.log_softmax(-1)[-len(item.answer_ids) :]
        nats -= float(chances.gather(-1, torch.tensor(item.answer_ids)[:, None]).sum())
        tokens += len(item.answer_ids)
        kept, units = kept + float(result.stats.kept), units + result.stats.units
    assert row["score"]["mean"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert row["effective_budget"] == pytest.approx(kept / units)


class Stop(KeyboardInterrupt):
    pass


def stop_after(items: int) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "evaluating" and done == items:
            raise Stop

    return progress


def test_an_interrupted_run_continues_where_it_was(
    loaded: LoadedModel,
    bundle: Bundle,
    data: dict[str, Any],
    own_data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store(loaded, bundle, PLAN)
    with pytest.raises(Stop):
        evaluate(loaded, bundle, PLAN, store, progress=stop_after(4))
    assert [path.parent for path in own_data_folder.iterdir()] == [own_data_folder]
    ran: list[int] = []
    original = library._run
    monkeypatch.setattr(library, "_run", lambda *args: ran.append(1) or original(*args))  # type: ignore[func-returns-value]
    monkeypatch.setattr(closed_loop, "match_dials", None)  # found before
    store = open_store(loaded, bundle, PLAN)
    assert store.count("items/") == 4 and store.count("dials/") == 2
    continued = evaluate(loaded, bundle, PLAN, store)
    assert len(ran) == 2, "of six items"
    assert json.dumps(continued) == json.dumps(data), "as if it had never been interrupted"
    store.remove()
    assert not list(own_data_folder.iterdir())


def test_other_conditions_start_anew(loaded: LoadedModel, bundle: Bundle) -> None:
    plans = [PLAN, dataclasses.replace(PLAN, seed=1), dataclasses.replace(PLAN, samples=2)]
    paths = {open_store(loaded, bundle, plan).path for plan in plans}
    other = dataclasses.replace(loaded, weights_hash="sha256:" + "2" * 64)
    paths |= {open_store(other, bundle, PLAN).path, open_store(loaded, None, PLAN).path}
    paths.add(open_store(loaded, make_bundle(loaded, Gate.PRE_ROPE), PLAN).path)
    assert len(paths) == 6
    assert open_store(loaded, make_bundle(loaded), PLAN).path in paths


def test_a_damaged_or_foreign_file_counts_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    store = Store(path, {"a": 1})
    with store.saving():
        store.put("x", 1)
    assert Store(path, {"a": 1}).get("x") == 1
    assert Store(path, {"a": 2}).get("x") is None
    path.write_bytes(path.read_bytes()[:-5])
    assert len(Store(path, {"a": 1})) == 0


def test_seeds_give_other_items(loaded: LoadedModel, data: dict[str, Any]) -> None:
    plan = dataclasses.replace(PLAN, selectors=("dense",), budgets=(), seed=1)
    other = evaluate(loaded, None, plan, memory())
    assert score_of(other, "perplexity", "dense") != score_of(data, "perplexity", "dense")


def test_dense_alone_needs_no_bundle_and_no_budget(loaded: LoadedModel, data: dict[str, Any]) -> None:
    plan = dataclasses.replace(PLAN, selectors=("dense",), budgets=())
    alone = evaluate(loaded, None, plan, memory())
    assert [row["point"] for row in alone["rows"]] == ["dense", "dense"]
    assert score_of(alone, "perplexity", "dense") == score_of(data, "perplexity", "dense")
    with pytest.raises(UsageError, match="needs a bundle"):
        evaluate(loaded, None, PLAN, memory())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("nothing",)}, "task 'nothing': choose from single_needle"),
        ({"selectors": ("prhs", "h3o")}, "selector 'h3o': choose from dense, oracle, prhs"),
        ({"selectors": ()}, "choose from"),
        ({"budgets": (0.5, 1.0)}, "budget 1.0 must be a fraction"),
        ({"budgets": ()}, "no budget and no delta"),
        ({"samples": 0}, "samples = 0"),
        ({"confidence": 1.0}, "confidence 1.0"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(PLAN, **changes)


def test_lengths_that_cannot_be_are_refused_before_the_run(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="length 513 is beyond the context of tiny, 512 tokens"):
        open_store(loaded, None, dataclasses.replace(PLAN, lengths=(300, 513)))
    with pytest.raises(UsageError, match=r"task lookup_64: length 300 is too short"):
        open_store(loaded, None, dataclasses.replace(PLAN, tasks=("lookup_64",)))
    assert dataclasses.replace(PLAN, lengths=()).for_context(512).lengths == (512,)
    assert dataclasses.replace(PLAN, lengths=()).for_context(3000).lengths == (2048,)


def test_public_tasks_without_the_extra_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.split_tasks(None) == (tuple(TASKS), ())
    monkeypatch.setattr(lm_harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"task 'gsm8k' is not built in.*pip install 'prhs\[eval\]'"):
        library.split_tasks(["perplexity", "gsm8k"])
    monkeypatch.setattr(lm_harness.importlib.util, "find_spec", lambda name: name)
    assert library.split_tasks(["gsm8k", "perplexity", "gsm8k"]) == (("perplexity",), ("gsm8k",))


def test_items_of_tasks_fit_the_random_state() -> None:
    """Building items leaves the caller's random numbers alone."""
    random.seed(3)
    state = random.getstate()
    TASKS["single_needle"].build(tiny_tokenizer(), length=300, seed=0, templates="seen")
    assert random.getstate() == state


def test_equal_bytes_interpolates_between_budgets_and_never_beyond() -> None:
    def row(selector: str, read: float, score: float, length: int = 64) -> dict[str, Any]:
        return {
            "selector": selector,
            "point": f"{selector}@{read}",
            "length": length,
            "kv_bytes_read": read,
            "attended_fraction": read / 2,
            "score": {"mean": score},
        }

    means = [row("dense", 1.0, 1.0), row("prhs", 0.15, 0.9), row("prhs", 0.5, 1.0)]
    means += [row("quest", 0.2, 0.8), row("quest", 0.1, 0.4), row("oracle", 0.6, 1.0)]
    means += [row("quest", 0.4, 0.0, length=128), row("quest", 0.6, 0.0, length=128)]
    first, second = rows.at_equal_bytes(means)
    assert first["point"] == "prhs@0.15" and first["others"] == {"quest": pytest.approx(0.6)}
    assert second["others"] == {}, "nothing is said about bytes that no budget of another selector reads"

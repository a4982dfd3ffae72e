"""Public benchmarks: our `LM` against the harness's own on local tasks, sparse, interrupted and refused."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_calibration.bundle import Bundle
from prhs_calibration.bundle_format import BundleMetadata
from prhs_calibration.evaluation import closed_loop
from prhs_calibration.evaluation.evaluate import evaluate, open_store
from prhs_calibration.evaluation.harness_model import PrhsLM, _before
from prhs_calibration.evaluation.plan import Plan
from prhs_calibration.evaluation.points import Point
from prhs_calibration.evaluation.store import Store
from prhs_calibration.fingerprint import fingerprint_of
from prhs_calibration.models import LoadedModel
from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.selectors.baselines import AtBudget, OracleTopK
from prhs_kernels.testing.models import tiny_model, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra `eval`) is not installed")

TASKS = ("local_text", "local_choice", "local_rolling")
DOCUMENTS = 6
COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
OWN = {
    "local_text": """output_type: generate_until
doc_to_text: "{{text}}. Then {{name}} is"
doc_to_target: " {{answer}}"
generation_kwargs:
  until: ["e", "qq"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
    "local_choice": """output_type: multiple_choice
doc_to_text: "{{text}}. Then {{name}} is"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
""",
    "local_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of the three kinds of request, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, colours = random.Random(0), ["red", "blue", "green", "gold"]
    documents = []
    for _ in range(DOCUMENTS):
        facts = {f"n{rng.randrange(1000)}": rng.choice(colours) for _ in range(20)}
        name = rng.choice(sorted(facts))
        text = ". ".join(f"{who} is {what}" for who, what in facts.items())
        documents.append(
            {"text": text, "name": name, "answer": facts[name], "choices": colours}
            | {"label": colours.index(facts[name])}
        )
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, text in OWN.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + text)
    absent = COMMON.format(name="local_absent", data=folder / "absent.jsonl")
    (folder / "absent.yaml").write_text(absent + OWN["local_choice"])
    return folder


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


@pytest.fixture(scope="module")
def bundle(loaded: LoadedModel) -> Bundle:
    dial = torch.tensor([0.02, 0.1, 0.3, 1.0])

    def heads(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((4, 2), value, dtype=dtype)

    tensors = {
        "time/lambda": dial,
        "time/budget_ratio": dial[:, None, None].expand(-1, 4, 2).contiguous(),
        "time/budget_tokens": torch.zeros(4, 4, 2, dtype=torch.int32),
        "time/gate": heads(1, torch.uint8),
        "time/tau_cos": heads(0.0, torch.float32),
        "time/block": heads(8, torch.int32),
        "time/dilation": heads(0, torch.int32),
        "risk/loss": torch.zeros(60, 4),
    }
    metadata = BundleMetadata(
        model_id="tiny",
        revision="local",
        fingerprint=loaded.fingerprint,
        weights_hash=loaded.weights_hash,
        tokenizer_hash=loaded.tokenizer_hash,
        corpus_hash="sha256:34",
        seeds={},
        split_sizes={"fit": 8, "select": 60, "verify": 0},
        context_length=512,
        delta=0.2,
        dial_index=2,
        num_sinks=1,
        num_local=4,
    )
    return Bundle(metadata, tensors)


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def plan(folder: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"public": TASKS, "task_path": str(folder), "samples": 3, "budgets": (0.25,)}
    return Plan(**{"tasks": (), "lengths": (512,), "selectors": ("prhs", "oracle")} | settings | changes)


def harness(model: Any, folder: Path, tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
    )
    return dict(found)


def ours(loaded: LoadedModel, tmp_path: Path, point: Point | None = None) -> PrhsLM:
    point = point or Point("dense", dense_params(loaded.model.config))
    points = dict.fromkeys([*TASKS, "any"], point)
    return PrhsLM(loaded, points, store=Store(tmp_path / "store.json", {}))


def test_dense_gives_what_the_harness_gives_itself(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    """Every response to every request, against the harness's own Hugging Face model."""
    from lm_eval.models.huggingface import HFLM

    theirs = harness(
        HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, max_length=512), folder
    )
    mine = harness(ours(loaded, tmp_path), folder)
    for task in TASKS:
        assert len(mine["samples"][task]) == DOCUMENTS
        for one, other in zip(mine["samples"][task], theirs["samples"][task], strict=True):
            same(one["resps"], other["resps"])
        assert mine["results"][task].keys() == theirs["results"][task].keys()
    written = [flat(sample["resps"])[0] for sample in mine["samples"]["local_text"]]
    assert all("e" not in text and "qq" not in text for text in written) and any(written)


def same(one: Any, other: Any) -> None:
    """Texts and choices exactly, likelihoods as close as single precision allows."""
    for mine, theirs in zip(flat(one), flat(other), strict=True):
        assert mine == theirs if isinstance(theirs, str | bool) else mine == pytest.approx(theirs, rel=1e-4)


def flat(responses: Any) -> list[Any]:
    return (
        [part for each in responses for part in flat(each)]
        if isinstance(responses, list | tuple)
        else [responses]
    )


def test_texts_beyond_the_context_go_in_windows(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    short = dataclasses.replace(loaded, context_length=64)
    theirs = harness(
        HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, max_length=64),
        folder,
        ("local_rolling", "local_choice"),
    )
    mine = harness(ours(short, tmp_path), folder, ("local_rolling", "local_choice"))
    for task in ("local_rolling", "local_choice"):
        for one, other in zip(mine["samples"][task], theirs["samples"][task], strict=True):
            same(one["resps"], other["resps"])


def test_rows_of_every_task_metric_and_point(loaded: LoadedModel, bundle: Bundle, folder: Path) -> None:
    chosen = plan(folder, delta=0.2)
    before = {name: id(value) for name, value in vars(lm_eval.evaluator).items()}
    data = evaluate(loaded, bundle, chosen, open_store(loaded, bundle, chosen))
    assert {name: id(value) for name, value in vars(lm_eval.evaluator).items()} == before
    json.dumps(data)
    metrics = {"local_text": "exact_match", "local_choice": "acc", "local_rolling": "bits_per_byte"}
    points = ["dense", "prhs@0.25", "prhs@δ=0.2", "oracle@0.25"]
    assert [(row["task"], row["metric"], row["point"]) for row in data["rows"]] == [
        (task, metric, point) for task, metric in metrics.items() for point in points
    ]
    for row in data["rows"]:
        assert row["samples"] == 3 and row["length"] is None
        if row["selector"] == "dense":
            assert row["attended_fraction"] == 1 and row["difference"] is None
            continue
        bits = row["metric"] == "bits_per_byte"
        assert (row["difference"]["low"] is None) == bits, "not a mean over documents: no interval"
        assert row["attended_fraction"] < 0.7
        assert row["retrieval_ratio"] == 1 if row["selector"] == "oracle" else row["retrieval_ratio"] < 1
    sparse = next(row for row in data["rows"] if row["point"] == "prhs@0.25" and row["task"] == "local_text")
    assert sparse["attended_fraction"] == pytest.approx(0.25, rel=0.1)


def test_sparse_points_change_the_answers(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    dense = dense_params(loaded.model.config)
    oracle = Point("oracle", dense, 0.05, chooser=AtBudget(OracleTopK(), 0.05))
    mine = ours(loaded, tmp_path / "a", oracle)
    one = harness(mine, folder)["samples"]
    other = harness(ours(loaded, tmp_path / "b"), folder)["samples"]
    for task in TASKS:
        assert [flat(sample["resps"]) for sample in one[task]] != [flat(s["resps"]) for s in other[task]]
    for task in ("local_text", "local_choice"):
        assert mine.stats[task].attended_fraction == pytest.approx(0.05, rel=0.1)


def test_an_interrupted_run_continues_at_the_next_request(
    loaded: LoadedModel, bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(folder, selectors=("prhs",), public=("local_text", "local_choice"))
    whole = evaluate(loaded, bundle, chosen, open_store(loaded, bundle, chosen))
    open_store(loaded, bundle, chosen).remove()

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "loglikelihood, prhs@0.25" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, bundle, chosen, open_store(loaded, bundle, chosen), progress=stop)
    store = open_store(loaded, bundle, chosen)
    assert store.count("items/local_text/") == 6 and store.count("items/local_choice/") == 12 + 5
    scored: list[int] = []
    original = PrhsLM._score
    monkeypatch.setattr(PrhsLM, "_score", lambda *args: scored.append(1) or original(*args))  # type: ignore[func-returns-value]
    again = evaluate(loaded, bundle, chosen, store)
    assert len(scored) == 12 - 5, "of the two points' twelve choices each"
    assert json.dumps(again) == json.dumps(whole)


def test_answers_that_allow_no_sharing_are_an_error(
    loaded: LoadedModel, bundle: Bundle, folder: Path
) -> None:
    """A budget of everything leaves nothing to share."""
    wide = dataclasses.replace(bundle, tensors=dict(bundle.tensors) | {"time/gate": torch.zeros(4, 2).byte()})
    chosen = plan(folder, public=("local_text",))
    with pytest.raises(InputError, match="prhs@0.25 never reused a set on local_text"):
        evaluate(loaded, wide, chosen, open_store(loaded, wide, chosen))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"public": ("local_absent",)}, InputError, "the data of task 'local_absent' cannot be had"),
        ({"public": ("no_such_task",)}, UsageError, "task 'no_such_task' is not known to lm-eval"),
        ({"task_path": "/no/such/folder"}, InputError, "is not a folder"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    loaded: LoadedModel, folder: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    chosen = plan(folder, selectors=("dense",), **changes)
    with pytest.raises(error, match=words) as caught:
        evaluate(loaded, None, chosen, open_store(loaded, None, chosen))
    assert "\n" not in str(caught.value)


def test_failures_inside_the_harness_are_one_line(
    loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(PrhsLM, "_score", fail)
    chosen = plan(folder, selectors=("dense",), public=("local_choice",))
    with pytest.raises(InputError, match="failed on local_choice: RuntimeError: two lines"):
        evaluate(loaded, None, chosen, open_store(loaded, None, chosen))
    assert capfd.readouterr() == ("", ""), "the harness is muted"


def test_sampling_is_seeded_and_repeats_differ(loaded: LoadedModel, tmp_path: Path) -> None:
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests: Any = [Request(("some context", settings))] * 2
    first = ours(loaded, tmp_path / "a").generate_until(requests)
    assert first == ours(loaded, tmp_path / "b").generate_until(requests) and first[0] != first[1]


@dataclasses.dataclass
class Request:
    args: tuple[Any, ...]
    task_name: str = "any"


def test_more_text_than_the_model_has_room_for_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    requests: Any = [Request(("some context", {"until": [], "max_gen_toks": 511}))]
    with pytest.raises(InputError, match="the task asks for 511 new tokens, the context of tiny is 512"):
        ours(loaded, tmp_path).generate_until(requests)
    long: Any = [Request(("word " * 300, {"until": ["z"], "max_gen_toks": 4}))]
    assert len(ours(loaded, tmp_path).generate_until(long)) == 1, "a longer context loses its beginning"


def test_stop_sequences() -> None:
    assert _before("one two three", ["three", "two"]) == "one "
    assert _before("one", ["two"]) == _before("one", []) == "one"


def test_budgets_are_matched_on_the_tasks_own_contexts(
    loaded: LoadedModel, bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = closed_loop.match_dials
    monkeypatch.setattr(closed_loop, "match_dials", lambda *args: seen.append(args[2]) or original(*args))  # type: ignore[func-returns-value]
    chosen = plan(folder, selectors=("prhs",), samples=1)
    evaluate(loaded, bundle, chosen, open_store(loaded, bundle, chosen))
    text, choice, rolling = seen
    assert [len(prompts) for prompts in seen] == [4, 4, 4]
    assert all(len(tokens) - prefill == 8 for tokens, prefill in [*text, *choice])
    assert all(prefill == 1 for _, prefill in rolling)
    assert loaded.tokenizer.decode(text[0][0]).endswith(" is")

"""`prhs evaluate` and `prhs plot accuracy`: rows, tables, figures, interruptions and bad input."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from prhs_calibration.evaluation import evaluate as library
from prhs_calibration.evaluation import lm_harness
from prhs_cli.accuracy import doubts
from prhs_cli.plots import accuracy, style
from prhs_kernels.errors import InputError

from .conftest import Prhs, Workplace

TASKS = "single_needle,perplexity"
COMMON = ("--tasks", TASKS, "--lengths", "300", "--budgets", "1/4,0.5", "--quiet")


@pytest.fixture(scope="module")
def result(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prhs_cli.app import run

    path = tmp_path_factory.mktemp("result") / "accuracy.json"
    source = ("--model", str(workplace.model), "--bundle", str(workplace.bundle))
    assert run(["evaluate", *COMMON, *source, "--samples", "2", "--delta", "0.2", "-o", str(path)]) == 0
    return path


def source(workplace: Workplace) -> tuple[object, ...]:
    return "--model", workplace.model, "--bundle", workplace.bundle


def test_one_file_holds_every_row(result: Path) -> None:
    content = json.loads(result.read_text())
    assert content["kind"] == "evaluate"
    assert {"versions", "command", "device", "seeds"} <= content["conditions"].keys()
    rows = content["data"]["rows"]
    points = {row["point"] for row in rows}
    expected = {f"{name}@{b}" for name in ("prhs", "oracle", "streaming-llm", "quest") for b in (0.25, 0.5)}
    assert points == expected | {"dense", "prhs@δ=0.2"} and len(rows) == 2 * len(points)
    columns = {"score", "difference", "effective_budget", "retrieval_ratio", "attended_fraction"}
    for row in rows:
        assert columns | {"kv_bytes_read", "matched", "dial"} <= row.keys()
        assert row["length"] == 300 and row["samples"] == 2


def test_tables_and_json(prhs: Prhs, workplace: Workplace, own_data_folder: Path) -> None:
    arguments = ("evaluate", *COMMON, *source(workplace), "--samples", 1, "--selectors", "prhs")
    done = prhs(*arguments)
    assert done.code == 0 and done.err == ""
    for words in ("single_needle at 300 tokens, 1 items: exact match", "perplexity at 300 tokens", "KV read"):
        assert words in done.out
    assert len(done.out.split("single_needle")) == 2, "the mean of a single task says nothing new"
    assert "dense attention itself scores 0 on these tasks" in done.out, "a random model finds no needle"
    printed = prhs(*arguments, "--json").json
    files = sorted((own_data_folder / "results").glob("evaluate-*.json"))
    assert len(files) == 2
    assert [json.loads(path.read_text())["data"] for path in files] == [printed["data"]] * 2
    assert not list((own_data_folder / "results" / "partial").glob("*")), "nothing is left to continue"


def test_a_capable_model_is_not_doubted() -> None:
    def averages(*scores: float) -> dict[str, Any]:
        return {"averages": [{"selector": "dense", "score": {"mean": score}} for score in scores]}

    assert doubts(averages(0.9, 1.0)) == doubts(averages()) == []
    assert "scores 0.2 on" in doubts(averages(0.9, 0.2))[0]


def test_published_budgets_are_rows_of_their_own(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    arguments = ("--selectors", "h2o,snapkv", "--samples", 1, "--quiet", "--budgets", "0.25,published")
    tasks = ("--tasks", "single_needle", "--lengths", "300")
    done = prhs("evaluate", *tasks, "--model", workplace.model, "-o", tmp_path / "r.json", *arguments)
    assert done.code == 0 and "20 %" in done.out and "1024" in done.out
    rows = json.loads((tmp_path / "r.json").read_text())["data"]["rows"]
    names = ["dense", "h2o@0.25", "h2o@20 % of the prompt", "snapkv@0.25", "snapkv@1024"]
    assert [row["point"] for row in rows] == names
    assert [row["matched"] is None for row in rows] == [True, False, True, False, True]
    figure = drawn(tmp_path / "r.json")
    assert len(figure.axes[0].containers) == 4 and len(figure.legends[0].get_texts()) == 3
    done = prhs("plot", "accuracy", tmp_path / "r.json", "-o", tmp_path / "r.svg")
    assert done.code == 0


def test_dense_needs_no_bundle(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs(
        "evaluate", *COMMON, "--model", workplace.model, "--selectors", "dense", "--samples", 1, "--json"
    )
    assert done.code == 0
    assert {row["selector"] for row in done.json["data"]["rows"]} == {"dense"}
    assert done.json["conditions"]["bundle"] is None


def test_ctrl_c_keeps_what_is_done_and_says_so(
    prhs: Prhs, workplace: Workplace, own_data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("evaluate", *COMMON, *source(workplace), "--samples", 2, "--selectors", "prhs,oracle")
    original, ran = library._run, []

    def interrupted(*args: Any) -> Any:
        ran.append(1)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(library, "_run", interrupted)
    done = prhs(*arguments)
    assert done.code == 130
    assert done.error == "interrupted: 3 finished items are kept; the same command continues there"
    assert not list((own_data_folder / "results").glob("*.json"))
    loud = [argument for argument in arguments if argument != "--quiet"]
    again = prhs(*loud)
    assert again.code == 0 and "continuing an interrupted run: 3 items are done" in again.err
    assert len(ran) == 5, "of four items one was left"
    monkeypatch.setattr(library, "_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    other = prhs(*arguments, "--seed", 5)
    assert other.error.startswith("interrupted: no item was finished, what was found for matching is kept")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--budgets", "1/0"], 2, "not a list of numbers such as 1/16"),
        (["--budgets", "half"], 2, "--budgets"),
        (["--budgets", "2"], 2, "budget 2.0 must be a fraction"),
        (["--lengths", "300.5"], 2, "not a list of numbers such as 2048"),
        (["--lengths", "100000"], 2, "length 100000 is beyond the context"),
        (["--lengths", "20"], 2, "task single_needle"),
        (["--selectors", "snapkw"], 2, "selector 'snapkw': choose from dense"),
        (["--tasks", ","], 2, "no task"),
        (["--samples", "0"], 2, "samples"),
        (["--delta", "0.000001"], 3, "cannot promise this delta"),
        (["--backend", "triton"], 4, "backend"),
    ],
)
def test_bad_input_is_one_line(
    prhs: Prhs, workplace: Workplace, arguments: list[str], code: int, words: str
) -> None:
    done = prhs("evaluate", *COMMON, *source(workplace), *arguments)
    assert done.code == code
    assert words in done.error


def test_a_benchmark_without_the_extra_is_refused_before_the_model_is_loaded(
    prhs: Prhs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_harness.importlib.util, "find_spec", lambda name: None)
    done = prhs("evaluate", "--tasks", "gsm8k", "--model", "/no/such/model")
    assert done.code == 2 and "pip install 'prhs[eval]'" in done.error


# --- the figure ---


def drawn(result: Path, change: Any = lambda data: None) -> Any:
    content = json.loads(result.read_text())
    change(content["data"])
    with style.styled():
        figure = accuracy.figure(content)
        figure.draw_without_rendering()
    return figure


def test_plot_accuracy(prhs: Prhs, result: Path, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.svg"
    done = prhs("plot", "accuracy", result, "-o", path)
    assert done.code == 0 and f"wrote {path}" in done.out
    text = path.read_text()
    for words in ("PrHS", "Quest", "StreamingLLM", "oracle top-k", "dense", "exact match", "perplexity"):
        assert words in text, words
    first = path.read_bytes()
    prhs("plot", "accuracy", result, "-o", path)
    assert path.read_bytes() == first


def test_scores_stand_at_the_measured_budget(result: Path) -> None:
    rows = json.loads(result.read_text())["data"]["rows"]
    exact, perplexity = drawn(result).axes
    assert exact.get_title(loc="left") == "(a) single_needle, 300 tokens"
    assert perplexity.get_title(loc="left") == "(b) perplexity, 300 tokens"
    for number, name in enumerate(style.SELECTORS):
        mine = [row for row in rows if row["task"] == "perplexity" and row["selector"] == name]
        mine = [row for row in mine if row["delta"] is None]
        container = perplexity.containers[number if number < 2 else number + 1]
        line = container.lines[0]
        assert container.get_label() == style.SELECTORS[name].label
        assert line.get_ydata() == pytest.approx([row["score"]["mean"] for row in mine])
        assert line.get_xdata() == pytest.approx([row["attended_fraction"] for row in mine], rel=0.06)
    assert len(perplexity.containers) == 5, "four selectors, and PrHS where δ decides"


def test_bars_are_the_paired_interval(result: Path) -> None:
    def planted(data: dict[str, Any]) -> None:
        for row in data["rows"]:
            if row["selector"] == "quest" and row["task"] == "perplexity":
                row["score"] = {"mean": 12.0, "low": 1.0, "high": 99.0}
                row["difference"] = {"mean": 2.0, "low": 1.5, "high": 3.0}

    bars = drawn(result, planted).axes[1].containers[3].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [[11.5, 13.0]] * 2


def test_a_wild_perplexity_gets_a_logarithmic_axis(result: Path) -> None:
    def planted(data: dict[str, Any]) -> None:
        data["rows"][-1]["score"] |= {"mean": 1e5}

    assert drawn(result).axes[1].get_yscale() == "linear"
    assert drawn(result, planted).axes[1].get_yscale() == "log"


def test_legend_and_panels_do_not_touch(result: Path) -> None:
    def many(data: dict[str, Any]) -> None:
        for group in ("rows", "averages"):
            longer = copy.deepcopy(data[group])
            for row in longer:
                row["length"] = 4096
            data[group] += longer

    for change in (lambda data: None, many):
        figure = drawn(result, change)
        boxes = [axis.get_tightbbox() for axis in figure.axes]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        box, whole = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 >= -0.01 and box.x1 <= whole.width + 0.01 and box.y1 <= whole.height + 0.01


def test_other_results_are_refused(prhs: Prhs, result: Path, tmp_path: Path) -> None:
    content = json.loads(result.read_text())
    with pytest.raises(InputError, match="not a 'evaluate' result"):
        accuracy.figure(content | {"kind": "bound"})
    del content["data"]["averages"]
    with pytest.raises(InputError, match="incomplete"):
        accuracy.figure(content)
    wrong = tmp_path / "bound.json"
    wrong.write_text(json.dumps(content | {"kind": "bound"}))
    done = prhs("plot", "accuracy", wrong, "-o", tmp_path / "f.png")
    assert done.code == 3 and "holds a result of kind 'bound'" in done.error


def test_a_single_item_has_no_bars(result: Path) -> None:
    def alone(data: dict[str, Any]) -> None:
        for row in [*data["rows"], *data["averages"]]:
            for name in ("score", "difference"):
                if row[name] is not None:
                    row[name] |= {"low": None, "high": None}

    for axis in drawn(result, alone).axes:
        assert not axis.patches and not any(container.has_yerr for container in axis.containers)


def test_commands_of_the_reproduction_page_are_ones_that_exist() -> None:
    """Parsed, not run."""
    import typer

    from prhs_calibration.evaluation.plan import Plan
    from prhs_cli.app import app

    from .conftest import ROOT

    verbs: Any = getattr(typer.main.get_command(app), "commands")  # noqa: B009
    lines = (ROOT / "docs" / "reproduce-paper.md").read_text("utf-8").splitlines()
    found = [line.split()[1:] for line in lines if line.startswith("prhs ")]
    assert len(found) >= 8
    for verb, *arguments in found:
        context = verbs[verb].make_context(verb, list(arguments))
        if verb == "evaluate":
            Plan((), (), samples=context.params["samples"])

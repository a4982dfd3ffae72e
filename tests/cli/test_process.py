"""The command line as a process of its own: start-up time, exit codes, Ctrl-C, closed pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..kernels.test_bench import needs_triton
from .conftest import DELTA, ROOT, Prhs, Workplace

PRHS = [sys.executable, "-m", "prhs_cli"]


@pytest.fixture
def environment(own_data_folder: Path) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "calibration")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def test_help_answers_in_half_a_second(environment: dict[str, str]) -> None:
    times = []
    for _ in range(5):  # the best of five: other processes may be using the machine
        began = time.perf_counter()
        done = subprocess.run([*PRHS, "--help"], env=environment, capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - began)
        assert done.returncode == 0 and "calibrate" in done.stdout
    assert min(times) < 0.5, times


@pytest.mark.parametrize(
    "verb",
    ["calibrate", "inspect", "verify-bound", "generate", "analyze", "plot", "evaluate", "bench", "models"],
)
def test_help_of_every_verb_has_examples(environment: dict[str, str], verb: str) -> None:
    done = subprocess.run(
        [*PRHS, verb, "--help"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"  prhs {verb} " in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--version"], 0), ([], 2), (["nonsense"], 2), (["inspect", "/absent.safetensors"], 3)],
)
def test_exit_codes(environment: dict[str, str], arguments: list[str], code: int) -> None:
    done = subprocess.run([*PRHS, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_shown_where_nothing_was_asked(prhs: Prhs) -> None:
    bare, asked = prhs(), prhs("--help")
    assert bare.out == asked.out and "\n  calibrate" in bare.out and bare.err == ""
    assert (bare.code, asked.code) == (2, 0)


def test_debug_prints_the_traceback(environment: dict[str, str]) -> None:
    arguments = ["inspect", "/absent.safetensors", "--debug"]
    done = subprocess.run([*PRHS, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Traceback" in done.stderr


def interrupted(environment: dict[str, str], arguments: tuple[object, ...], at: str) -> str:
    """What a command says on stderr after a Ctrl-C at the progress line that holds `at`."""
    process = subprocess.Popen(
        [*PRHS, *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # SIGINT may be ignored where the tests run, and a child would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = []
    while not seen or at not in seen[-1]:
        seen.append(process.stderr.readline())
        assert seen[-1], "".join(seen)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest and rest.startswith("prhs: interrupted: "), rest
    return rest


def test_ctrl_c_in_calibrate_leaves_no_half_written_bundle(
    environment: dict[str, str], workplace: Workplace, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "bundle.safetensors"
    output.parent.mkdir()
    size = ("--prompts", 300, "--delta", DELTA, "--context-length", 96)
    command = ("calibrate", workplace.model, *size, "--corpus", workplace.corpus, "-o", output)
    # in the middle of the longest stage
    assert "no bundle was written" in interrupted(environment, command, at="risk curve")
    assert list(output.parent.iterdir()) == []


def test_ctrl_c_in_generate_keeps_whole_answers(
    environment: dict[str, str], workplace: Workplace, tmp_path: Path
) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"{i} " * 20}) + "\n" for i in range(400)))
    given = ("--prompt-file", questions, "--model", workplace.model, "--bundle", workplace.bundle)
    more = ("--max-new-tokens", 60, "--batch-size", 2, "-o", answers)
    rest = interrupted(environment, ("generate", *given, *more), at="tokens: ")
    done = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert f"{len(done)} of 400 prompts are finished" in rest and 0 < len(done) < 400


def test_ctrl_c_in_evaluate_keeps_finished_items(
    environment: dict[str, str], workplace: Workplace, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    given = ("--model", workplace.model, "--bundle", workplace.bundle, "--tasks", "perplexity", "-o", output)
    command = ("evaluate", *given, "--samples", 200, "--lengths", 256, "--selectors", "dense,oracle")
    rest = interrupted(environment, command, at="evaluating")
    assert "kept; the same command continues there" in rest and not output.exists()
    kept = list((Path(environment["XDG_DATA_HOME"]) / "prhs").rglob("*.*"))
    assert [path.suffix for path in kept] == [".json"] and json.loads(kept[0].read_text())


@needs_triton
def test_ctrl_c_in_bench_keeps_finished_rows(environment: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    toy = environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    rest = interrupted(toy, ("bench", "operator", "-o", output), at="bench operator")
    data = json.loads(output.read_text())["data"]
    assert not data["complete"] and f"{len(data['rows'])} rows are kept in {output}" in rest


def test_a_closed_pipe_is_no_error(environment: dict[str, str]) -> None:
    line = f"'{sys.executable}' -m prhs_cli models --json | head -c 1"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("prhs generate --model reference-", ["reference-8k"]),
        ("prhs calibrate qwen3-", ["qwen3-0.6b", "qwen3-4b", "qwen3-8b"]),
        ("prhs generate --batch", ["--batch-size"]),
    ],
)
def test_the_shell_completes_options_and_model_names(
    environment: dict[str, str], words: str, offered: list[str]
) -> None:
    asked = {"_PRHS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(PRHS, env=environment | asked, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == offered, done.stderr

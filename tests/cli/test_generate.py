"""Many prompts in one run: order, lengths, answers that are kept, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_cli.answers import AnswerFile

from .conftest import ROOT, Prhs, Workplace, random_text
from .test_bad_input import rewrite_metadata

TEXTS = {
    "short": "one two",
    "long": random_text(2000)[:300],
    "middle": "The access code of Bob is 12345. The code",
    "other": "one two three",
}
LIMITS = {"long": 5, "other": 9}
NEW_TOKENS = 12


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    objects: list[dict[str, Any]] = [{"id": name, "prompt": text} for name, text in TEXTS.items()]
    for entry in objects:
        entry |= {"max_new_tokens": LIMITS[entry["id"]]} if entry["id"] in LIMITS else {}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in objects), "utf-8")
    return path


def generation(workplace: Workplace, file: Path, *more: object) -> list[object]:
    common = ["--model", workplace.model, "--bundle", workplace.bundle, "--dtype", "float32"]
    return ["generate", "--prompt-file", file, *common, "--max-new-tokens", NEW_TOKENS, *more]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_mixed_lengths_give_the_tokens_of_single_runs_in_input_order(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    alone, expected = tmp_path / "alone.txt", []
    for name, text in TEXTS.items():
        alone.write_text(text, "utf-8")
        limit = LIMITS.get(name, NEW_TOKENS)
        single = prhs(*generation(workplace, alone, "--max-new-tokens", limit, "--json")).json["sparse"]
        expected.append((name, {key: single[key] for key in ("text", "tokens", "finish")}))
        assert len(single["tokens"]) == limit and single["finish"] == "length"
    for more in (("--batch-size", 1), ("--batch-size", 3), ()):
        done = prhs(*generation(workplace, questions, "--json", *more))
        assert done.code == 0
        assert [(answer["id"], answer["sparse"]) for answer in lines(done.out)] == expected


def test_a_prompt_draws_the_same_in_every_batch_and_after_an_interrupt(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = generation(workplace, questions, "--temperature", 1.5, "--seed", 3)
    whole = lines(prhs(*command, "--json").out)
    assert len({tuple(answer["sparse"]["tokens"][:5]) for answer in whole}) == 4
    for size in (1, 2, 3):
        assert lines(prhs(*command, "--json", "--batch-size", size).out) == whole
    output = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        assert prhs(*command, "--output", output, "--batch-size", 1).code == 130
    assert prhs(*command, "--output", output).code == 0
    assert lines(output.read_text("utf-8")) == whole
    assert lines(prhs(*command, "--json", "--mode", "released").out)[0]["sparse"] == whole[0]["sparse"]


def test_texts_are_printed_in_order_below_their_ids(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    answers = lines(prhs(*generation(workplace, questions, "--json")).out)
    shown = prhs(*generation(workplace, questions, "--batch-size", 1))
    expected = "".join(f"=== {a['id']} ===\n{a['sparse']['text']}\n" for a in answers)
    assert shown.code == 0 and shown.out == expected
    separated = tmp_path / "questions.txt"
    separated.write_text("\n---\n".join(TEXTS[name] for name in ("short", "middle")) + "\n---\n", "utf-8")
    numbered = lines(prhs(*generation(workplace, separated, "--json")).out)
    assert [answer["id"] for answer in numbered] == ["1", "2"]
    assert [answer["sparse"] for answer in numbered] == [answers[0]["sparse"], answers[2]["sparse"]]


def test_stats_of_many_prompts(prhs: Prhs, workplace: Workplace, questions: Path) -> None:
    done = prhs(*generation(workplace, questions, "--json", "--stats", "--batch-size", 3))
    *answers, last = lines(done.out)
    figures = last["sparse"]
    assert (figures["prompts"], figures["batches"]) == (4, 2)
    assert figures["new_tokens"] == sum(len(answer["sparse"]["tokens"]) for answer in answers) == 5 + 9 + 24
    assert figures["prompt_tokens"] == sum(map(len, TEXTS.values()))
    assert figures["total_tokens_per_second"] > figures["tokens_per_second"] > 0
    assert 0 < figures["attended_fraction"] < 1
    table = prhs(*generation(workplace, questions, "--stats")).out
    assert "tokens per second, all sequences" in table and "attended fraction" in table


def test_released_mode_writes_the_same_tokens(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    exact = rewrite_metadata(workplace.bundle, tmp_path / "exact.safetensors", key_copy="exact")
    command = generation(workplace, questions, "--json", "--stats", "--bundle", exact)
    audited, released = lines(prhs(*command).out), lines(prhs(*command, "--mode", "released").out)
    tokens = [[answer["sparse"]["tokens"] for answer in answers[:-1]] for answers in (audited, released)]
    assert tokens[0] == tokens[1]
    figures = [answers[-1]["sparse"] for answers in (audited, released)]
    assert [f["mode"] for f in figures] == ["audited", "released"]
    assert [f["backend"] for f in figures] == ["reference", "reference"]
    for name in ("prompt_tokens", "new_tokens"):
        assert figures[0][name] == figures[1][name]
    slots, row = 300 + NEW_TOKENS, 2 * 2 * 16 * 4  # the longest prompt and its new tokens; K and V of 2 heads
    dense = [f["kv_bytes_resident_dense"] for f in figures]
    assert dense == [4 * 4 * (slots - 1) * row, 4 * 4 * slots * row], (
        "the engine keeps room for the last token"
    )
    assert figures[1]["kv_bytes_resident"] <= dense[1]


def test_an_audit_of_everything_is_the_dropped_mass(
    prhs: Prhs, workplace: Workplace, questions: Path
) -> None:
    command = generation(workplace, questions, "--batch-size", 2, "--delta", 0.4)
    whole = lines(prhs(*command, "--audit", 1, "--json", "--stats").out)
    plain = lines(prhs(*command, "--json").out)
    assert [a["sparse"] for a in whole[:-1]] == [a["sparse"] for a in plain], "it changes nothing"
    figures = whole[-1]["sparse"]
    mass = figures["audited_dropped_mass"]
    assert 0 < mass < 1 and figures["mode"] == "audited" and figures["audited_units"] > 0
    assert figures["audited_dropped_mass_lower"] == figures["audited_dropped_mass_upper"] == mass
    assert figures["audit_verdict"] == ("held" if mass <= 0.4 else "violated")
    part = lines(prhs(*command, "--audit", 0.3, "--json", "--stats").out)[-1]["sparse"]
    assert part["audited_dropped_mass_lower"] <= mass <= part["audited_dropped_mass_upper"]
    done = prhs(*command, "--audit", "auto", "--batch-size", 3, "--json", "--stats")
    figures = lines(done.out)[-1]["sparse"]
    # three sequences of two KV heads; the last batch has one, but the same coin
    assert figures["batches"] == 2 and figures["audit_probability"] == pytest.approx(0.1 / 6)
    shown = prhs(*command, "--audit", 1, "--compare", "dense", "--stats")
    assert shown.code == 0 and "dropped mass of this run" in shown.out and "δ = 0.4" in shown.out
    refused = prhs(*command, "--audit", 0.1, "--mode", "released")
    assert refused.code == 2 and "exclude each other" in refused.error
    for wrong in (0, "often", 1.5, "nan"):
        done = prhs(*command, "--audit", wrong)
        assert done.code == 2 and f"{wrong} is neither auto nor in (0, 1]" in done.error


def test_key_copies_choose_alike_in_both_modes(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    copied = rewrite_metadata(workplace.bundle, tmp_path / "copied.safetensors", key_copy="int8")
    command = generation(workplace, questions, "--bundle", copied, "--json")
    audited, released = lines(prhs(*command).out), lines(prhs(*command, "--mode", "released").out)
    assert [answer["sparse"] for answer in audited[:-1]] == [answer["sparse"] for answer in released[:-1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_backend_that_cannot_run_here_is_4_before_the_model_is_read(
    prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("prhs_calibration.models.load", fail)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = prhs(*generation(workplace, questions, "--backend", "triton"))
    assert done.code == 4 and "use backend 'reference'" in done.error


def test_why_the_engine_does_not_run_is_said_once(
    prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prhs_kernels.runtime import decode

    reason = "head_dim = 16 has no kernel"
    monkeypatch.setattr(decode, "use_triton", lambda backend, tensor: True)
    monkeypatch.setattr(decode, "engine_unsupported", lambda model, params, backend: reason)
    done = prhs(*generation(workplace, questions, "--batch-size", 1, "--compare", "dense"))
    assert done.code == 0 and done.err.count(reason) == 1


def test_dense_is_compared_prompt_by_prompt(prhs: Prhs, workplace: Workplace, questions: Path) -> None:
    done = prhs(*generation(workplace, questions, "--compare", "dense", "--delta", 0.4, "--batch-size", 2))
    assert done.code == 0 and done.out.count("--- dense ---") == 4
    answers = lines(
        prhs(*generation(workplace, questions, "--compare", "dense", "--delta", 0.4, "--json")).out
    )
    equal = 0
    for answer in answers:
        sparse, dense, same = answer["sparse"]["tokens"], answer["dense"]["tokens"], answer["same_tokens"]
        assert sparse[:same] == dense[:same] and (sparse == dense or sparse[same] != dense[same])
        equal += sparse == dense
    assert f"agree on all tokens of {equal} of 4 prompts" in done.out


def test_a_stop_token_ends_its_prompt_only(
    prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {
        a["id"]: a["sparse"]["tokens"] for a in lines(prhs(*generation(workplace, questions, "--json")).out)
    }
    stop = free["short"][3]
    monkeypatch.setattr("prhs_cli.prompting.stop_token_ids", lambda model, tokenizer: (stop,))
    for answer in lines(prhs(*generation(workplace, questions, "--json")).out):
        whole = free[answer["id"]]
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert answer["sparse"]["tokens"] == whole[:end]
        assert answer["sparse"]["finish"] == ("stop" if stop in whole else "length")


def test_output_is_in_input_order_and_is_not_made_twice(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    command = generation(workplace, questions, "--output", output)
    done = prhs(*command)
    assert done.code == 0 and str(output) in done.out
    assert lines(output.read_text("utf-8")) == lines(prhs(*generation(workplace, questions, "--json")).out)
    written = output.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished prompt was made again")

    monkeypatch.setattr("prhs_kernels.runtime.batches.generate_batch", fail)
    again = prhs(*command, "--json")
    assert again.code == 0 and again.json["answers"] == 0 and "4 of 4 prompts" in again.err
    assert output.read_bytes() == written


@pytest.mark.parametrize("lost", [1, 40])
def test_a_line_cut_off_by_a_crash_is_made_again(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path, lost: int
) -> None:
    output = tmp_path / "answers.jsonl"
    command = generation(workplace, questions, "--output", output)
    prhs(*command)
    written = output.read_bytes()
    output.write_bytes(written[:-lost])
    done = prhs(*command)
    assert done.code == 0 and "3 of 4 prompts" in done.err
    assert output.read_bytes() == written


def test_answers_made_otherwise_are_refused(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    prhs(*generation(workplace, questions, "--output", output))
    written = output.read_bytes()
    for more in (("--max-new-tokens", 13), ("--delta", 0.3), ("--temperature", 1), ("--compare", "dense")):
        done = prhs(*generation(workplace, questions, "--output", output, *more))
        assert done.code == 3 and "other settings" in done.error and str(output) in done.error, more
    for foreign in ("not JSON\n", '{"id": "short"}\n', '["short"]\n', '{"id": [], "request": ""}\n'):
        output.write_text(foreign, "utf-8")
        done = prhs(*generation(workplace, questions, "--output", output))
        assert done.code == 3 and f"{output} line 1" in done.error
        assert output.read_text("utf-8") == foreign, "a file of someone else stays as it is"
    output.write_bytes(written)


def test_more_prompts_extend_the_file(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    output, whole = tmp_path / "answers.jsonl", questions.read_text("utf-8").splitlines(keepends=True)
    questions.write_text("".join(whole[2:]), "utf-8")
    prhs(*generation(workplace, questions, "--output", output))
    questions.write_text("".join(whole[:3]), "utf-8")
    assert prhs(*generation(workplace, questions, "--output", output)).code == 0
    names = [answer["id"] for answer in lines(output.read_text("utf-8"))]
    assert names == ["short", "long", "middle", "other"], "what is no longer asked for is kept behind"


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Fail in the middle of the batch that follows `count` finished ones."""
    from prhs_kernels.runtime import batches

    original, begun = batches.generate_batch, []

    def failing(*args: Any, **kwargs: Any) -> Iterator[list[int | None]]:
        begun.append(1)
        for step, tokens in enumerate(original(*args, **kwargs)):
            if len(begun) > count and step == 2:
                raise error
            yield tokens

    monkeypatch.setattr(batches, "generate_batch", failing)


def test_an_interrupt_keeps_finished_prompts_and_the_rest_follows(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    prhs(*generation(workplace, questions, "--output", whole))
    command = generation(workplace, questions, "--output", output, "--batch-size", 1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        done = prhs(*command)
    assert done.code == 130
    assert "2 of 4 prompts are finished" in done.error and str(output) in done.error
    assert [answer["id"] for answer in lines(output.read_text("utf-8"))] == ["long", "middle"]
    assert prhs(*command).code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_an_interrupt_prints_what_is_finished(
    prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lines(prhs(*generation(workplace, questions, "--json")).out)
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    done = prhs(*generation(workplace, questions, "--json", "--batch-size", 2))
    assert done.code == 130 and "2 of 4 prompts are finished and printed above" in done.error
    assert lines(done.out) == expected[1:3], "the longest two ran first"
    stop_after(monkeypatch, 0, KeyboardInterrupt())
    done = prhs(*generation(workplace, questions))
    assert done.code == 130 and done.out == "" and "no prompt was finished" in done.error


def test_an_interrupt_of_one_text_says_what_there_is(
    prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 0, KeyboardInterrupt())
    done = prhs(*generation(workplace, workplace.prompt))
    assert (done.code, len(done.out) > 1) == (130, True) and "the text so far" in done.error
    done = prhs(*generation(workplace, workplace.prompt, "--json"))
    assert (done.code, done.out) == (130, "") and "nothing was printed" in done.error


def test_ctrl_c_in_a_process(workplace: Workplace, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    more = ("--output", output, "--batch-size", 1, "--max-new-tokens", 100)
    arguments = map(str, generation(workplace, questions, *more))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "calibration")))
    process = subprocess.Popen(
        [sys.executable, "-m", "prhs_cli", *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    began = time.monotonic()
    while not output.exists() or b"\n" not in output.read_bytes():
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "prompts are finished and in" in err and "Traceback" not in err
    assert [answer["id"] for answer in lines(output.read_text("utf-8"))][0] == "long"


def test_memory_decides_the_batch_size(
    prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prhs_calibration import memory, models

    loaded = models.load(str(workplace.model), device="cpu", dtype="float32")
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)  # the weights already fit
    one = memory.run_bytes(loaded.model.config, len(TEXTS["long"]) + NEW_TOKENS, loaded.dtype)
    monkeypatch.setattr(memory, "available", lambda device: 2 * one + one // 2)
    *_, last = lines(prhs(*generation(workplace, questions, "--json", "--stats")).out)
    assert last["sparse"]["batches"] == 2, "two fit together"
    done = prhs(*generation(workplace, questions, "--batch-size", 3))
    assert (
        done.code == 4 and "--batch-size 2 fits" in done.error and "3 sequences of 312 tokens" in done.error
    )
    monkeypatch.setattr(memory, "available", lambda device: one // 2)
    done = prhs(*generation(workplace, questions))
    assert done.code == 4 and "a context of 312 tokens" in done.error and done.out == ""
    fits = int(done.error.split(" up to ")[1].split()[0])
    assert memory.run_bytes(loaded.model.config, fits, loaded.dtype) <= one // 2
    assert memory.run_bytes(loaded.model.config, fits + 2, loaded.dtype) > one // 2


def test_memory_that_runs_out_all_the_same_is_4_and_keeps_what_is_finished(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    stop_after(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    done = prhs(*generation(workplace, questions, "--output", output, "--batch-size", 2))
    assert done.code == 4
    for words in ("out of memory on cpu", "2 sequences of", "--batch-size 1 may fit", "2 of 4 prompts"):
        assert words in done.error
    assert len(lines(output.read_text("utf-8"))) == 2


@pytest.mark.parametrize("mode", ["audited", "released"])
def test_memory_that_runs_out_inside_the_prefill_is_4(
    mode: str, prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a layer of the second batch, of the reference loop and of the engine; what was finished is there."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    original, begun = LlamaMLP.forward, []

    def failing(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] > 1:  # a prompt
            begun.append(1)
            if len(begun) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        made: torch.Tensor = original(self, hidden)
        return made

    monkeypatch.setattr(LlamaMLP, "forward", failing)
    done = prhs(*generation(workplace, questions, "--mode", mode, "--batch-size", 2, "--json"))
    assert done.code == 4 and len(lines(done.out)) == 2
    for words in ("out of memory on cpu with", "expected beside the weights", "2 of 4 prompts"):
        assert words in done.error
    assert ("--batch-size 1 may fit" if mode == "audited" else "what may fit: ") in done.error


def test_unusable_prompts_and_outputs_are_3(
    prhs: Prhs, workplace: Workplace, questions: Path, tmp_path: Path
) -> None:
    with questions.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "x" * 600}) + "\n")
    done = prhs(*generation(workplace, questions))
    assert done.code == 3 and "line 5 has 600 tokens" in done.error and done.out == ""
    questions.write_text('{"prompt": "a"}\n{"prompt": }\n', "utf-8")
    assert "line 2 is not JSON" in prhs(*generation(workplace, questions)).error
    done = prhs(*generation(workplace, workplace.prompt, "--output", tmp_path / "absent" / "a.jsonl"))
    assert done.code == 3 and "absent" in done.error
    assert prhs(*generation(workplace, workplace.prompt, "--batch-size", 0)).code == 2


def test_a_device_is_not_read_for_answers(
    prhs: Prhs, workplace: Workplace, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/zero and /dev/full have no end: reading them took all memory of the machine."""
    monkeypatch.setattr(AnswerFile, "_read", lambda self: pytest.fail("read a device"))
    done = prhs(*generation(workplace, questions, "--output", "/dev/zero"))
    assert done.code == 3 and "not a regular file" in done.error


def test_keys_without_meaning_are_named(prhs: Prhs, workplace: Workplace, questions: Path) -> None:
    questions.write_text('{"prompt": "a", "max_tokens": 3}\n', "utf-8")
    done = prhs(*generation(workplace, questions))
    assert done.code == 0 and "max_tokens" in done.err

"""What users and their machines get wrong: one line that says what to do, and the exit code."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prhs_calibration import memory
from prhs_calibration.bundle import Bundle

from .conftest import Prhs, Workplace, write_model


def generate(workplace: Workplace, prompt: object, *more: object) -> list[object]:
    return [
        "generate",
        "--prompt-file",
        prompt,
        "--model",
        workplace.model,
        "--bundle",
        workplace.bundle,
        *more,
    ]


def rewrite_metadata(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a bundle whose metadata say something else; tensors untouched."""
    raw = source.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["prhs"]) | changes
    header["__metadata__"]["prhs"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return target


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrat"], "did you mean 'calibrate'?"),
        (["calibrate"], "'MODEL'"),
        (["calibrate", "reference", "--delta", "1"], "not between 0 and 1"),
        (["calibrate", "reference", "--delta", "0"], "not between 0 and 1"),
        (["calibrate", "reference", "--delta", "nan"], "not between 0 and 1"),
        (["calibrate", "reference", "--prompts", "0"], "--prompts"),
        (["calibrate", "reference", "--target", "worst"], "--target"),
        (["verify-bound", "--delta", "-1"], "not between 0 and 1"),
        (["verify-bound", "--confidence", "1"], "not between 0 and 1 (both excluded); 0.95"),
        (["generate"], "--prompt-file"),
        (["generate", "--prompt-file", "x", "--temperature", "-1"], ">= 0"),
        (["generate", "--prompt-file", "x", "--top-p", "0"], "(0, 1]"),
        (["generate", "--prompt-file", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--prompt-file", "x", "--compare", "oracle"], "dense"),
        (["analyze", "posterior-bias", "--budgets", "a,b"], "--budgets"),
        (["plot", "posterior-bias", "-o", "figure.docx"], ".png"),
        (["plot", "pie"], "posterior-bias"),
        (["inspect"], "'BUNDLE'"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_wrong_usage_is_2(prhs: Prhs, arguments: list[str], words: str) -> None:
    done = prhs(*arguments)
    assert done.code == 2
    assert words.lower() in done.error.lower()
    assert "--help" in done.error or words == ".png"


def test_axes_and_devices_that_cannot_be_meant_are_2(prhs: Prhs, workplace: Workplace) -> None:
    for option, value in (("--axes", "time,width"), ("--device", "tpu"), ("--dtype", "int3")):
        done = prhs("calibrate", workplace.model, option, value)
        assert done.code == 2, done
        assert value.split(",")[-1] in done.error


def test_a_length_beyond_the_context_is_2(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    output = tmp_path / "result"
    asked = ("--context-length", 513, "--model", workplace.model, "--bundle", workplace.bundle, "-o", output)
    for command in (
        ("calibrate", workplace.model, "--context-length", 513, "-o", output),
        ("calibrate", workplace.model, "--context-length", 513, "--dry-run"),
        ("verify-bound", *asked),
        ("analyze", "posterior-bias", *asked),
    ):
        done = prhs(*command)
        assert done.code == 2, done
        assert "length 513 is beyond the context" in done.error and "512 tokens" in done.error
        assert not output.exists()


def test_too_few_prompts_for_the_asked_delta_is_2(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    done = prhs(
        "calibrate", workplace.model, "--delta", 0.001, "--prompts", 20, "-o", tmp_path / "b.safetensors"
    )
    assert done.code == 2
    assert "999" in done.error, "the number of prompts that would do is named"
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"", "is empty"), (b" \n\t", "is empty"), (b"caf\xe9", "not UTF-8")],
)
def test_unusable_prompt_is_3(
    prhs: Prhs, workplace: Workplace, tmp_path: Path, content: bytes | None, words: str
) -> None:
    prompt = tmp_path / "prompt.txt"
    if content is not None:
        prompt.write_bytes(content)
    done = prhs(*generate(workplace, prompt))
    assert done.code == 3
    assert words in done.error and str(prompt) in done.error


def test_prompt_that_is_a_folder_is_3(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    assert prhs(*generate(workplace, tmp_path)).code == 3


def test_prompt_longer_than_the_context_is_3(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    prompt = tmp_path / "long.txt"
    prompt.write_text("x" * 600)
    done = prhs(*generate(workplace, prompt))
    assert done.code == 3
    assert "600 tokens" in done.error and "context of 512" in done.error and done.out == ""


def test_unknown_model_is_3_and_suggests(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs("generate", "--prompt-file", workplace.prompt, "--model", "lama-3-8b")
    assert done.code == 3
    assert "llama-3-8b" in done.error


def test_model_not_on_disk_without_a_network_is_3(
    prhs: Prhs, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    done = prhs("generate", "--prompt-file", workplace.prompt, "--model", "llama-3-8b")
    assert done.code == 3
    assert "on disk" in done.error and "HF_HUB_OFFLINE" in done.error and "Meta-Llama-3-8B" in done.error


def test_gated_model_is_3(prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: object, **kwargs: object) -> None:
        response: Any = SimpleNamespace(headers={}, status_code=403, request=SimpleNamespace(headers={}))
        raise GatedRepoError("403 Client Error", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    done = prhs("calibrate", "llama-3-8b")
    assert done.code == 3
    assert "gated" in done.error and "log in" in done.error


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "foreign", "future", "swapped"])
def test_unusable_bundle_is_3(prhs: Prhs, workplace: Workplace, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bundle.safetensors"
    good = workplace.bundle.read_bytes()
    words = "bundle.safetensors"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("certainly not a bundle, but long enough to be one")
    elif damage == "truncated":
        path.write_bytes(good[:-9])
        words = "truncated"
    elif damage == "foreign":
        path.write_bytes((workplace.model / "model.safetensors").read_bytes())
        words = "not a bundle"
    elif damage == "future":
        rewrite_metadata(workplace.bundle, path, schema_version=99)
        words = "newer prhs"
    elif damage == "swapped":
        rewrite_metadata(workplace.bundle, path, dial_index=-3)
        words = "dial_index"
    for verb in (["inspect", path], generate(workplace, workplace.prompt, "--bundle", path)):
        done = prhs(*verb)
        assert done.code == 3, done
        assert words in done.error and str(path) in done.error


def test_bundle_of_another_model_is_3_and_names_the_field(
    prhs: Prhs, workplace: Workplace, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", "qwen3")
    done = prhs("generate", "--prompt-file", workplace.prompt, "--model", other, "--bundle", workplace.bundle)
    assert done.code == 3
    assert "model_type" in done.error and "llama" in done.error and "qwen3" in done.error


def test_no_bundle_for_a_model_is_3(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs("generate", "--prompt-file", workplace.prompt, "--model", workplace.model)
    assert done.code == 3
    assert "prhs calibrate" in done.error


def test_delta_that_the_curve_does_not_cover_is_3(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs(*generate(workplace, workplace.prompt, "--delta", 0.0001))
    assert done.code == 3
    assert "0.0001" in done.error


def test_missing_corpus_is_3(prhs: Prhs, workplace: Workplace, tmp_path: Path) -> None:
    done = prhs("calibrate", workplace.model, "--corpus", tmp_path / "absent")
    assert done.code == 3
    assert "absent" in done.error


def test_removing_an_unknown_bundle_is_3(prhs: Prhs) -> None:
    assert prhs("models", "--remove", "absent").code == 3


def test_unwritable_output_is_found_before_the_work(
    prhs: Prhs, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("prhs_calibration.models.load", fail)
    absent = tmp_path / "absent" / "out"
    for verb in (
        ["calibrate", workplace.model, "-o", absent],
        ["verify-bound", "-o", absent],
        ["analyze", "posterior-bias", "-o", absent],
        ["plot", "posterior-bias", "-o", f"{absent}.png"],
    ):
        done = prhs(*verb)
        assert done.code == 3, done
        assert str(absent) in done.error


def test_full_disk_is_4_and_leaves_nothing(
    prhs: Prhs, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    done = prhs("calibrate", workplace.model, "-o", tmp_path / "b.safetensors")
    assert done.code == 4
    assert "no space left" in done.error
    assert [path.name for path in tmp_path.iterdir() if path.name != "xdg"] == []


def test_not_enough_memory_is_found_before_the_weights_are_read(
    prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were read first")

    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    done = prhs(*generate(workplace, workplace.prompt))
    assert done.code == 4
    assert "not enough memory" in done.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_absent_device_is_4(prhs: Prhs, workplace: Workplace) -> None:
    done = prhs(*generate(workplace, workplace.prompt, "--device", "cuda"))
    assert done.code == 4
    assert "cpu" in done.error


def test_result_file_of_another_kind_is_3(prhs: Prhs, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    result.write_text('{"kind": "bound", "schema": 1, "conditions": {}, "data": {}}')
    done = prhs("plot", "posterior-bias", result, "-o", tmp_path / "f.png")
    assert done.code == 3
    assert "'bound'" in done.error
    assert not (tmp_path / "f.png").exists()


def test_debug_gives_the_exception(prhs: Prhs, tmp_path: Path) -> None:
    from prhs_kernels.errors import InputError

    with pytest.raises(InputError):
        prhs("inspect", tmp_path / "absent", "--debug")


def test_damage_of_the_metadata_is_seen_by_the_loader(workplace: Workplace, tmp_path: Path) -> None:
    """The rewritten copy is otherwise a good bundle, so that the tests above test what they say."""
    copy = Bundle.load(rewrite_metadata(workplace.bundle, tmp_path / "copy.safetensors"))
    assert dataclasses.asdict(copy.metadata) == dataclasses.asdict(Bundle.load(workplace.bundle).metadata)

"""A tiny model on disk, a corpus, and a bundle calibrated through the command line itself."""

from __future__ import annotations

import dataclasses
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_cli.app import run
from prhs_kernels.testing.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DELTA = 0.2
CALIBRATION = ("--delta", str(DELTA), "--prompts", "12", "--fit-prompts", "4", "--context-length", "160")


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Paths that the tests of the commands share; nothing in it may be changed."""

    model: Path
    corpus: Path
    bundle: Path
    prompt: Path


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))

    @property
    def error(self) -> str:
        """The one line of the error; fails when there is not exactly one, or a traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("prhs: ")]
        assert len(lines) == 1 and self.err.rstrip().endswith(lines[0]), self.err
        return lines[0].removeprefix("prhs: ")


Prhs = Callable[..., Done]


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or changes the user's bundles and results."""
    folder = tmp_path / "xdg"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder / "prhs"


@pytest.fixture
def prhs(capsys: pytest.CaptureFixture[str]) -> Prhs:
    """Run a command line in this process."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def write_model(folder: Path, model_type: str = "llama") -> Path:
    """A tiny random model whose texts do not end by chance: the logit of its stop token is always 0."""
    model = tiny_model(model_type)
    with torch.no_grad():
        model.get_output_embeddings().weight[model.config.eos_token_id] = 0.0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_text(chars: int) -> str:
    """Lines of seeded words: the corpus must not change when the project's files do."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(500)]
    lines = (" ".join(rng.choices(words, k=12)) for _ in range(chars // 60))
    return "\n".join(lines)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("workplace")
    model = write_model(folder / "tiny")
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "words.txt").write_text(random_text(400_000), "ascii")
    bundle = folder / "bundle.safetensors"
    code = run(["calibrate", str(model), *CALIBRATION, "--corpus", str(corpus), "-o", str(bundle), "--quiet"])
    assert code == 0
    prompt = folder / "prompt.txt"
    prompt.write_text("The access code of Bob is 12345. " * 6, "utf-8")
    yield Workplace(model, corpus, bundle, prompt)

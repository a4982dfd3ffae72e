"""Two ranks on the CPU write what one process writes, from the same index sets; what ranks are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.runtime import distributed
from prhs_kernels.testing.models import tiny_checkpoint

from .conftest import CALIBRATION, ROOT, Prhs, Workplace

WORKER = Path(__file__).parent / "distributed" / "two_ranks.py"
# biases, norms of the heads, tied embeddings: what the ranks split differently
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"sliding_window": 20, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
}
CLOCKS = ("time_to_first_token", "tokens_per_second", "total_tokens_per_second")
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is missing: pip install 'prhs[distributed]'",
)


def torchrun(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = [ROOT, ROOT / "kernels", ROOT / "calibration", *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums of other threads have other last bits
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    process = subprocess.Popen(
        [sys.executable, *map(str, launch), *map(str, arguments)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.terminate()  # torchrun then ends its ranks; nothing when it is done
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Equal figures, clocks aside; sums over heads in another order may differ in the last bits."""
    names = first.keys() - set(CLOCKS)
    return first.keys() == second.keys() and all(
        first[name] == second[name]
        or (isinstance(first[name], float) and first[name] == pytest.approx(second[name], rel=1e-9))
        for name in names
    )


@needs_accelerate
def test_two_ranks_give_the_tokens_and_the_sets_of_one_process(
    prhs: Prhs, workplace: Workplace, tmp_path: Path
) -> None:
    for name, (model_type, overrides) in CHECKPOINTS.items():
        tiny_checkpoint(tmp_path / f"tiny-{name}", model_type, **overrides)
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    texts = ("one two", "The access code of Bob is 12345. " * 3, "one")
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), "utf-8")
    common = ["--model", workplace.model, "--bundle", workplace.bundle, "--max-new-tokens", 6]
    command = ["generate", "--prompt-file", questions, *common, "--compare", "dense", "--json", "--output"]

    done = torchrun(2, WORKER, tmp_path, *command, answers)
    assert done.returncode == 0, done.stderr[-3000:]
    _check_records(tmp_path)

    alone = tmp_path / "alone.jsonl"
    expected = prhs(*command, alone)
    assert answers.read_bytes() == alone.read_bytes()
    report = json.loads(done.stdout)  # one object: only rank 0 prints
    for name in ("sparse", "dense"):
        assert same(report[name], expected.json[name]), name
    assert done.stderr.count("on 2 ranks (cpu)") == 1


def _check_records(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("two_ranks", WORKER)
    assert spec is not None and spec.loader is not None
    worker: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    whole = worker.record(folder)
    ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]
    assert len(whole) == len(CHECKPOINTS) * len(worker.AXES)
    chosen = 0.0
    for name, expected in whole.items():
        for rank in ranks:
            assert rank[name]["tokens"] == expected["tokens"], name
            assert same(rank[name]["figures"], expected["figures"]), name
        sets = [
            torch.cat(parts, dim=1) for parts in zip(*(rank[name]["sets"] for rank in ranks), strict=True)
        ]
        assert len(sets) == len(expected["sets"]) > 0
        assert all(torch.equal(a, b) for a, b in zip(sets, expected["sets"], strict=True)), name
        chosen += float(torch.cat([s.float().flatten() for s in sets]).mean()) / len(whole)
    assert 0.05 < chosen < 0.95, "the sets must leave something out"


def test_calibration_shared_by_two_ranks_gives_the_same_bundle(workplace: Workplace, tmp_path: Path) -> None:
    """Every rank has the whole model: nothing beyond torch is needed."""
    bundle = tmp_path / "bundle.safetensors"
    arguments = [workplace.model, *CALIBRATION, "--corpus", workplace.corpus, "--json", "-o", bundle]
    done = torchrun(2, "-m", "prhs_cli", "calibrate", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bundle.read_bytes() == workplace.bundle.read_bytes()
    assert json.loads(done.stdout)["bundle"] == str(bundle), "one object: only rank 0 prints"
    assert done.stderr.count("on 2 ranks (cpu)") == 1


def pretend(monkeypatch: pytest.MonkeyPatch, size: int, rank: int = 0) -> None:
    """The environment of one of `size` ranks."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_that_cannot_share_the_heads_are_refused(
    prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", "--prompt-file", workplace.prompt, "--model", workplace.model)
    pretend(monkeypatch, 3)
    done = prhs(*command)
    assert done.code == 2
    assert "3 ranks cannot share the 2 KV heads" in done.error and "one of 1, 2" in done.error
    pretend(monkeypatch, 3, rank=1)
    silent = prhs(*command)
    assert (silent.code, silent.out, silent.err) == (2, "", ""), "rank 0 says it"
    for heads, size in ((8, 1), (8, 2), (8, 8)):
        distributed.check_heads(heads, size, "m")
    with pytest.raises(UsageError, match="16 ranks cannot share the 8 KV heads of m .* one of 1, 2, 4, 8"):
        distributed.check_heads(8, 16, "m")


def test_what_does_not_run_on_ranks_says_so(
    prhs: Prhs, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 2)
    done = prhs("evaluate", "--model", workplace.model, "--bundle", workplace.bundle)
    assert done.code == 2 and "does not run under torchrun" in done.error
    command = ("generate", "--model", workplace.model, "--prompt-file")
    done = prhs(*command, "-")
    assert done.code == 2 and "standard input" in done.error
    done = prhs(*command, workplace.prompt, "--device", "cuda:1")
    assert done.code == 2 and "each rank takes its own" in done.error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = prhs(*command, workplace.prompt)
    assert done.code == 2 and "pip install 'prhs[distributed]'" in done.error
    monkeypatch.delenv("MASTER_ADDR")
    assert distributed.launched() == distributed.Ranks(), (
        "some clusters set WORLD_SIZE for purposes of their own"
    )

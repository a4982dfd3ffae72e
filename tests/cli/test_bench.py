"""`prhs bench`: result files that grow row by row and are continued, exit codes, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_cli import benchmarks
from prhs_kernels.bench import operator, session

from ..kernels.test_bench import needs_triton, row
from .conftest import Prhs


class Benchmark:
    """Stands for `prhs_kernels.bench.operator`: rows whose time is the order in which they were measured."""

    RATIOS, Plan = operator.RATIOS, operator.Plan

    def __init__(self) -> None:
        self.tables, self.cost, self.derive = operator.tables, operator.cost, operator.derive
        self.default_points, self.toy_points = operator.default_points, operator.toy_points
        self.measured: list[str] = []
        self.stop: Callable[[], bool] = lambda: False
        self.wrong = ""

    def measure(self, plan: Any, kept: session.Session, device: str, dtype: torch.dtype) -> bool:
        for name in "abcd":
            if kept.has(name):
                continue
            if self.stop():
                return False
            self.measured.append(name)
            found = row(name, "dense", float(len(self.measured)), 4000)
            if name == self.wrong:
                found |= {"timing": None, "status": "wrong", "error": "wrong result, not timed"}
            kept.keep(found)
        return True


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    made = Benchmark()
    monkeypatch.setattr(benchmarks.Request, "module", property(lambda request: made))
    monkeypatch.setattr(session, "choose_device", lambda asked: "cpu")
    monkeypatch.setattr(session, "choose_dtype", lambda asked, device: torch.float16)
    return made


def stored(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


def test_interrupted_run_is_continued(prhs: Prhs, benchmark: Benchmark, own_data_folder: Path) -> None:
    def stop() -> bool:
        if len(benchmark.measured) == 2:
            raise KeyboardInterrupt
        return False

    benchmark.stop = stop
    done = prhs("bench", "operator")
    assert done.code == 130 and "2 rows are kept in" in done.error
    (path,) = (own_data_folder / "results").glob("bench-operator-*.json")
    assert not stored(path)["data"]["complete"]
    benchmark.stop = lambda: False
    done = prhs("bench", "operator", "--json")
    assert done.code == 0 and "2 rows are done" in done.err
    assert benchmark.measured == list("abcd")
    data = done.json["data"]
    assert data["complete"] and stored(path)["data"] == data
    assert [each["timing"]["p50"] for each in data["rows"]] == [1, 2, 3, 4]
    assert data["rows"][3]["over_dense"] == 0.25  # what follows from the rows is in the file too
    prhs("bench", "operator")  # a finished run is not continued
    assert len(benchmark.measured) == 8 and len(list(path.parent.iterdir())) == 2


def test_file_is_whole_after_every_row(prhs: Prhs, benchmark: Benchmark, tmp_path: Path) -> None:
    path, seen = tmp_path / "r.json", []

    def look() -> bool:
        seen.append(len(stored(path)["data"]["rows"]) if path.exists() else 0)
        return False

    benchmark.stop = look
    assert prhs("bench", "operator", "-o", path).code == 0
    assert seen == [0, 1, 2, 3]


def test_same_output_again_measures_nothing(prhs: Prhs, benchmark: Benchmark, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for _ in range(2):
        assert prhs("bench", "operator", "-o", path).code == 0
    assert len(benchmark.measured) == 4


@pytest.mark.parametrize("name", ["device", "code", "dtype", "plan"])
def test_other_conditions_start_anew(prhs: Prhs, benchmark: Benchmark, tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.json"
    prhs("bench", "operator", "-o", path)
    old = stored(path)
    old["conditions"][name] = "another"
    path.write_text(json.dumps(old))
    done = prhs("bench", "operator", "-o", path)
    assert f"another {name}: starting anew" in done.err and len(benchmark.measured) == 8


def test_time_limit_keeps_what_is_done(prhs: Prhs, benchmark: Benchmark, tmp_path: Path) -> None:
    benchmark.stop = lambda: len(benchmark.measured) == 3
    done = prhs("bench", "operator", "-o", tmp_path / "r.json", "--json")
    assert done.code == 0 and "out of time" in done.err
    assert len(done.json["data"]["rows"]) == 3 and not done.json["data"]["complete"]


def test_wrong_kernel_is_exit_code_1(prhs: Prhs, benchmark: Benchmark) -> None:
    benchmark.wrong = "b"
    done = prhs("bench", "operator")
    assert done.code == 1 and "b: wrong, wrong result, not timed" in done.out


def test_dry_run(prhs: Prhs, monkeypatch: pytest.MonkeyPatch, own_data_folder: Path) -> None:
    monkeypatch.setattr(session, "choose_device", lambda asked: pytest.fail("a device was touched"))
    done = prhs(
        "bench", "operator", "--shape", "llama-2-7b,qwen3-8b", "--context", "4096", "--dry-run", "--json"
    )
    assert done.code == 0 and done.json["seconds"] > 0 and len(done.json["cases"]) == 2
    assert not own_data_folder.exists()
    assert "estimated cost" in prhs("bench", "operator", "--dry-run").out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--shape", "gpt-5"], 2, "choose from llama-2-7b"),
        (["--context", "4096", "--kept", "5000"], 2, "less than the context"),
        (["--kept", "1/0"], 2, "not a list of numbers"),
        (["--batch", "8,many"], 2, "such as 1,8,16"),
        (["--retrieval", "2"], 2, "not between 0 and 1"),
        (["--fractions", "0.5"], 2, "no meaning in prhs bench operator"),
        (["--retrieval", "-1"], 2, "such as 0,1/16,1"),
        (["--dtype", "int3"], 2, "not one of auto"),
        (["--key-copy", "int3"], 2, "choose from exact, int8, fp8, int4"),
        (["--bundle", "/absent.safetensors"], 3, "/absent.safetensors"),
    ],
)
def test_bad_input_is_said_also_where_there_is_no_gpu(
    prhs: Prhs, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for dry in (["--dry-run"], []):
        done = prhs("bench", "operator", *dry, *arguments)
        assert done.code == code and words in done.error


def test_prefill_scans_nothing(prhs: Prhs) -> None:
    done = prhs("bench", "prefill", "--dry-run", "--key-copy", "int4")
    assert done.code == 2 and "--key-copy has no meaning in prhs bench prefill" in done.error


def test_other_result_is_not_overwritten(prhs: Prhs, benchmark: Benchmark, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("{}")
    done = prhs("bench", "operator", "-o", path)
    assert done.code == 3 and path.read_text() == "{}"


def test_a_place_that_cannot_be_written_is_said_first(prhs: Prhs, tmp_path: Path) -> None:
    done = prhs("bench", "decode", "-o", tmp_path / "absent" / "result.json")
    assert done.code == 3 and "choose a folder you can write to" in done.error


@pytest.mark.parametrize(("device", "words"), [("gpu0", "give auto or cuda:N"), ("cpu", "not a CUDA device")])
def test_wrong_devices(prhs: Prhs, monkeypatch: pytest.MonkeyPatch, device: str, words: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(session, "has_triton", lambda: True)
    done = prhs("bench", "prefill", "--device", device)
    assert done.code == 2 and words in done.error


def test_no_gpu(prhs: Prhs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = prhs("bench", "operator")
    assert done.code == 4 and "needs" in done.error


def test_bundle_gives_kept_and_ratio(prhs: Prhs, monkeypatch: pytest.MonkeyPatch) -> None:
    from prhs_calibration import bundle_store
    from prhs_calibration.bundle import Bundle
    from prhs_calibration.operating_point import operating_point

    path = bundle_store.reference_bundle_path()
    plan = benchmarks.Request("operator", contexts=(4096,), bundle=path).plan(toy=False)
    bundle = Bundle.load(path)
    found = operating_point(bundle, 4096)
    assert 0 < found.retrieval_ratio < 1 and 0 < found.kept < 1
    cost = float(bundle.tensors["profile/predicted_cost"][bundle.metadata.dial_index])
    assert found.kept + found.retrieval_ratio * bundle.params().scan_row / 2 == pytest.approx(cost)
    assert plan.ratios == (found.retrieval_ratio,) and plan.points[0].kept == round(found.kept * 4096)
    decode = benchmarks.Request("decode", contexts=(4096,), bundle=path).plan(toy=False)
    assert [kind.value for kind in decode.key_copies] == [found.key_copy] == [bundle.metadata.key_copy]


def test_plot_without_a_result_says_what_to_run(prhs: Prhs, tmp_path: Path) -> None:
    done = prhs("plot", "throughput", "-o", tmp_path / "f.png")
    assert done.code == 3 and "no result of prhs bench decode yet" in done.error


def toy_run(what: str, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The real thing, in a process whose triton interprets."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "prhs_cli", "bench", what, "-o", str(path), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@needs_triton
def test_operator_at_toy_size(tmp_path: Path) -> None:
    """Run twice, it measures once."""
    path = tmp_path / "r.json"
    given = ("--key-copy", "exact,int4", "--retrieval", "0,1/2,1")
    done = toy_run("operator", path, *given)
    assert "trial at toy size" in done.stderr and "sparse_decode + merge" in done.stdout
    changed = stored(path)
    data = changed["data"]
    assert data["complete"] and all(each["status"] == "ok" and each["timing"] for each in data["rows"])
    assert {"layer, ρ = 0", "layer, ρ = 1", "scan", "dense_decode"} <= {each["case"] for each in data["rows"]}
    layers = [each for each in data["rows"] if each["kind"] == "layer"]
    ratios = [each["values"]["retrieval_ratio"] for each in layers]
    assert ratios == [0, 0.5, 0.5, 0.5, 0.5, 1, 1]
    shares, retrieves, copied = layers[0], *layers[-2:]
    spread, blocks = layers[1], layers[3]
    assert spread["case"] == "layer, ρ = 0.5" and blocks["case"] == "layer, ρ = 0.5, in blocks of 2"
    # 2 rows: sets of as many positions as were kept, indices with them; 96 keys and scores in a scan
    moved = 2 * shares["values"]["mean_kept"] * (2 * 64 * 2 + 4)
    assert shares["num_bytes"] == int(moved)
    assert retrieves["num_bytes"] == int(moved) + 2 * 96 * (64 * 2 + 4)
    assert spread["num_bytes"] == blocks["num_bytes"] == int(moved) + 96 * (64 * 2 + 4)
    moved = 2 * copied["values"]["mean_kept"] * (2 * 64 * 2 + 4)
    assert copied["num_bytes"] == int(moved) + 2 * 96 * (32 + 4 + 4)  # codes, their scale, a score
    assert "rope_append with the gate + layer, ρ = 0" in {each["case"] for each in data["rows"]}
    del data["rows"][0]
    path.write_text(json.dumps(changed))
    assert "rows are done" in toy_run("operator", path, *given).stderr
    again = {each["key"]: each["timing"] for each in stored(path)["data"]["rows"]}
    assert len(again) == len(data["rows"]) + 1
    assert all(again[each["key"]] == each["timing"] for each in data["rows"])


@needs_triton
def test_decode_at_toy_size(tmp_path: Path) -> None:
    done = toy_run("decode", tmp_path / "r.json", "--retrieval", "0,1/2", "--key-copy", "exact,int4")
    assert "time to first token" in done.stdout
    rows = {each["case"]: each for each in stored(tmp_path / "r.json")["data"]["rows"]}
    assert all(each["status"] == "ok" and each["timing"] for each in rows.values())
    assert len(rows) == 10
    blocks = rows["sparse, ρ = 0.5, in blocks of 2"]["values"]
    assert blocks["retrieval_ratio"] == 0.5 and blocks["longest_step_us"] > 0
    assert f"in blocks of 2: longest step {blocks['longest_step_us'] / 1e3:.2f} ms" in done.stdout
    half, dense = rows["sparse, ρ = 0.5"], rows["dense_decode"]
    assert half["values"]["retrieval_ratio"] == 0.5 and dense["values"]["attended_fraction"] == 1
    kept = half["values"]["attended_fraction"]
    assert 0.3 < kept < 1
    # half of the units scan all keys, which are half of the bytes
    read = half["values"]["kv_read_bytes"] / dense["values"]["kv_read_bytes"]
    assert kept + 0.2 < read < kept + 0.3
    # a copy of 36 bytes per position stands for the 128 of exact keys
    copied = rows["sparse, ρ = 0.5, int4 keys"]["values"]["kv_read_bytes"] / dense["values"]["kv_read_bytes"]
    assert read - copied == pytest.approx((1 - 36 / 128) / 4, abs=0.02)


@needs_triton
def test_prefill_at_toy_size(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = toy_run("prefill", path, "--fractions", "1/2")
    assert "whole model" in done.stdout and "attention of one layer" in done.stdout
    data = stored(path)["data"]
    rows = {(each["case"], each["fraction"]): each for each in data["rows"]}
    assert len(rows) == 6 and all(each["status"] == "ok" and each["timing"] for each in rows.values())
    assert rows["window_prefill", 0.5]["flops_saved"] > 0.4
    # one of two layers computes the later half of the prompt: half of its tokens, 3/4 of its pairs
    assert 1 / 8 < rows["ETF", 0.5]["all_flops_saved"] < 1 / 4
    assert rows["full", 0]["all_flops_saved"] == 0
    assert rows["full", 0]["over_full"] == 1
    assert toy_run("prefill", path, "--fractions", "1/2") and stored(path)["data"] == data

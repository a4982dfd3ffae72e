"""The GPU script at toy size in the interpreter: it runs through and reports what fails without stopping."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prhs_kernels.bench.cases import Problem, Row, run_case
from prhs_kernels.bench.gpu_check import add_ratios, report
from prhs_kernels.bench.timing import copies_for


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_whole_script_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, "-m", "prhs_kernels.bench.gpu_check", "--seconds", "300", "--json", str(out)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(out.read_text("utf-8"))
    assert len(result["checks"]) == 8 and not [row for row in result["checks"] if row["error"]]
    assert not [row for row in result["times"] if row["timing"] is None]
    cases = {row["case"] for row in result["times"]}
    assert {"copy", "sparse_decode", "dense_decode", "scan", "weigh", "select + compact"} <= cases
    assert "copy bandwidth" in done.stdout


def test_it_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prhs_kernels.bench.gpu_check"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4 and "needs triton and a CUDA device" in done.stderr


def test_a_case_that_fails_becomes_a_row() -> None:
    def broken() -> list:
        raise RuntimeError("CUDA error: out of luck\nsecond line")

    row = run_case(Problem("p", 1, 2, 3, 3, 4), "broken", 5, broken)
    assert row.timing is None and row.error == "RuntimeError: CUDA error: out of luck"


def test_ratios_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Dense is the fastest unmasked one; the floor is bytes over the measured copy rate."""

    def row(case: str, spent: float | None, num_bytes: int) -> dict:
        timing = None if spent is None else {"p20": spent, "p50": spent, "p80": spent}
        return {**vars(Row("a", case, None, num_bytes, "no luck" if spent is None else "")), "timing": timing}

    rows = [
        row("copy", 10.0, 40_000),  # 4000 bytes per us
        row("dense_decode", 100.0, 400_000),
        row("sdpa flash", 80.0, 0),
        row("masked sdpa", 20.0, 0),  # not a rival
        row("sparse_decode", 5.0, 16_000),
        row("scan", None, 0),
    ]
    assert add_ratios(rows) == 4000
    sparse = rows[4]
    assert sparse["over_dense"] == 16 and sparse["floor_fraction"] == pytest.approx(0.8)
    assert rows[1]["floor_fraction"] == 1
    checks = [{"shape": "d64", "operator": "scan", "error": "length 3: off"}]
    report({"checks": checks, "times": rows, "copy_gb_per_s": 4.0, "conditions": {"device": "none"}})
    shown = capsys.readouterr().out
    assert "1 checks, 1 wrong" in shown and "WRONG d64 scan: length 3: off" in shown
    assert "failed: no luck" in shown and "16.00" in shown


def test_rotation_does_not_fit_a_cache() -> None:
    for size in (1, 2**20, 2**28, 2**33):
        assert 2 <= copies_for(size) <= 64
    assert copies_for(2**24) * 2**24 >= 256 * 2**20
    assert torch.cuda.is_available() or copies_for(2**33) == 2

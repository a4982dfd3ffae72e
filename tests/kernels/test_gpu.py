"""Every operator on a CUDA device, and a small case under compute-sanitizer; skipped without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_kernels.bench import checks
from prhs_kernels.bench.gpu_check import check_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL_CASE = """
from prhs_kernels.bench import checks
found = list(checks.check(checks.Shape(64, 2, "fp16"), "cuda", toy=True))
assert len(found) > 4 and not any(error for _, error in found), found
"""
OUT_OF_BOUNDS = """
import torch, triton, triton.language as tl
@triton.jit
def store(ptr, n):
    tl.store(ptr + n + tl.arange(0, 32), 1.0)
store[(1,)](torch.empty(64, device="cuda"), 64)
torch.cuda.synchronize()
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return check_all("cuda", 300)


@pytest.mark.parametrize("shape", list(map(str, checks.SHAPES)))
def test_every_operator_is_right(rows: list[dict[str, Any]], shape: str) -> None:
    ours = [row for row in rows if row["shape"] == shape]
    assert not [row for row in ours if row["error"]]
    assert {row["operator"] for row in ours} == {row["operator"] for row in rows}, "every operator has a row"


def sanitizer() -> str | None:
    """compute-sanitizer from the path or from a CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("code", "clean"), [(OUT_OF_BOUNDS, False), (SMALL_CASE, True)], ids=["planted", "ours"]
)
def test_no_access_outside_of_an_allocation(tmp_path: Path, code: str, clean: bool) -> None:
    """Without torch's caching allocator, so that each tensor ends where its allocation ends."""
    tool, script = sanitizer(), tmp_path / "case.py"
    assert tool is not None
    script.write_text(code, "utf-8")
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-W", "ignore", str(script)],
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    shown = done.stdout[-3000:] + done.stderr[-3000:]
    if clean:
        assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, shown
    else:
        assert done.returncode != 0 and "Invalid __global__ write" in done.stdout, shown

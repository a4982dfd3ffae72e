"""The kernels against the reference without a GPU: `interpreter/check_*.py` in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted((Path(__file__).parent / "interpreter").glob("check_*.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(file: Path, interpret: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    if interpret:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", CHECKS, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path) -> None:
    run(file, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("file", CHECKS, ids=lambda file: file.stem)
def test_compiled(file: Path) -> None:
    """The same checks on the GPU, in bf16 too."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run(file, interpret=False)


def test_there_are_checks() -> None:
    assert CHECKS

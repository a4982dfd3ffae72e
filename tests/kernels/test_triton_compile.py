"""What the compiler makes of the kernels, for GPUs that need not be there."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prhs_kernels.bench.compile_cases import ARCHITECTURES, MANY_ROWS, Case, full_grid, pairwise
from prhs_kernels.ops.backend import HEAD_DIMS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def pairs(cases: list[Case]) -> set[frozenset[tuple[str, Any]]]:
    found = set()
    for case in cases:
        items = list(dataclasses.asdict(case).items())
        found |= {frozenset((a, b)) for a in items for b in items if a[0] < b[0]}
    return found


def test_pairwise_keeps_every_pair_with_few_cases() -> None:
    grid = full_grid()
    some = pairwise(grid)
    assert pairs(some) == pairs(grid)
    assert len(some) < len(grid) / 8
    assert some == pairwise(grid), "the same subset every time"


@needs_triton
def test_no_kernel_spills_on_any_architecture(tmp_path: Path) -> None:
    """A pairwise set; `make compile-all` does the whole grid."""
    table = tmp_path / "compile.json"
    done = subprocess.run(
        [sys.executable, "-m", "prhs_kernels.bench.compile", "--pairwise", "--json", str(table)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = json.loads(table.read_text("utf-8"))["data"]
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    assert not [row for row in rows if row["spills"]]
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert all(row["shared"] <= 160 * 1024 for row in rows), "more than an A100 gives one program"


@needs_triton
def test_key_and_value_tiles_are_both_in_flight() -> None:
    """Two K and two V tiles of 64 rows at three stages: why the index tile is carried through the loop."""
    code = (
        "from prhs_kernels.bench.compile import Case, compile_case\n"
        "for kernel in ('sparse_decode', 'dense_decode'):\n"
        "    print(compile_case(Case(kernel, 90, 128, 'bf16', 4)).shared)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gathered, contiguous = map(int, done.stdout.split())
    assert gathered >= 2 * 2 * 64 * 128 * 2
    assert gathered == contiguous, "gathering costs no buffer"


def test_a_table_counts_every_kernel() -> None:
    count = collections.Counter(case.kernel for case in full_grid())
    decode = {"sparse_decode", "dense_decode", "merge_state", "gate", "scan", "choose"}
    copies = {f"{name} {kind}" for name in ("scan", "key copy") for kind in ("int8", "fp8", "int4")}
    assert set(count) == decode | copies | {"window_prefill", "count_dropped", MANY_ROWS}
    assert count[MANY_ROWS] == len(ARCHITECTURES) * (len(HEAD_DIMS) - 1) * 2 * 4
    assert count["window_prefill"] == len(ARCHITECTURES) * len(HEAD_DIMS) * 3
    assert count["scan"] == count["sparse_decode"] == len(ARCHITECTURES) * len(HEAD_DIMS) * 3 * 4
    assert count["scan int4"] == len(ARCHITECTURES) * len(HEAD_DIMS) * 3 * 2

"""One visit to a GPU: is every operator right, and how far is it from the byte floor?

`python -m prhs_kernels.bench.gpu_check [--seconds N] [--json OUT]`. Correctness first, each shape in a
process of its own; then the times. What fails is reported and does not stop the rest. Without a GPU, and
with `TRITON_INTERPRET=1`, everything runs at toy size: a trial of the script, no measurement.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prhs_kernels.bench import checks
from prhs_kernels.bench.cases import (
    PROBLEMS,
    TOY_PROBLEMS,
    Inputs,
    dense_cases,
    run_case,
    sparse_cases,
)
from prhs_kernels.bench.retrieval_cases import retrieval_cases, tuning_cases
from prhs_kernels.ops.backend import has_triton, interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOST = 3  # exit code of a process whose CUDA context is gone
CHECK_SECONDS = 60


def emit(row: dict[str, Any]) -> None:
    """One line of JSON for the parent process."""
    print(json.dumps(row), flush=True)


def run_checks(name: str) -> None:
    """Child: the operators at one shape."""
    shapes = checks.SHAPES if DEVICE == "cuda" else checks.TOY_SHAPES
    shape = next(shape for shape in shapes if str(shape) == name)
    for operator, wrong in checks.check(shape, DEVICE, toy=DEVICE != "cuda"):
        emit({"shape": name, "operator": operator, "error": wrong})


def sections() -> list[str]:
    """What is timed, most important first."""
    problems = [p.name for p in (PROBLEMS if DEVICE == "cuda" else TOY_PROBLEMS)]
    return ["bandwidth", *problems, *(["tune"] if DEVICE == "cuda" else [])]


def run_sections(names: Sequence[str], deadline: float) -> int:
    """Child: time the sections; a row per case, and a mark at the start of each section."""
    for name in names:
        emit({"section": name})
        for row in section(name):
            emit(dataclasses.asdict(row))
            if "CUDA error" in row.error or "AcceleratorError" in row.error:
                return LOST
            if time.time() > deadline:
                emit({"section": "", "stopped": name})
                return 0
    return 0


def section(name: str) -> Iterator[Any]:
    """Rows of one section."""
    if name == "bandwidth":
        yield from bandwidth()
        return
    problems = PROBLEMS if DEVICE == "cuda" else TOY_PROBLEMS
    problem = problems[0] if name == "tune" else next(p for p in problems if p.name == name)
    inputs = Inputs(problem, torch.bfloat16 if DEVICE == "cuda" else torch.float16, DEVICE)
    if name == "tune":
        yield from tuning_cases(inputs)
        return
    yield from sparse_cases(inputs)
    yield from dense_cases(inputs)
    yield from retrieval_cases(inputs)


def bandwidth() -> Iterator[Any]:
    """Bytes read and written by a kernel that copies, on buffers far larger than L2.

    Not by `copy_`: on an H200 that reached 2.7 TB/s where attention reads at 4.5.
    """
    size = 2**28 if DEVICE == "cuda" else 2**18  # elements of 4 bytes
    source, target = (torch.ones(size, device=DEVICE) for _ in range(2))
    yield run_case("device", "copy", 8 * size, lambda: [lambda: torch.mul(source, 1.5, out=target)])
    yield run_case("device", "read", 4 * size, lambda: [lambda: source.sum()])


def child(*arguments: str, timeout: float) -> tuple[int, list[dict[str, Any]], str]:
    """Run this module in a process of its own: exit code, its rows, the end of its error output."""
    command = [sys.executable, "-W", "ignore", "-m", "prhs_kernels.bench.gpu_check", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, timeout))
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, err = -1, "out of time"
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    rows = []
    for line in out.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return code, [row for row in rows if isinstance(row, dict)], err[-500:]


def all_checks() -> list[dict[str, Any]]:
    """Every shape, in parallel: compiling takes longer than checking."""
    shapes = [str(s) for s in (checks.SHAPES if DEVICE == "cuda" else checks.TOY_SHAPES)]
    workers = min(len(shapes), max(1, (os.cpu_count() or 1) // (1 if DEVICE == "cuda" else 2)))

    def one(name: str) -> list[dict[str, Any]]:
        code, rows, err = child("--check", name, timeout=CHECK_SECONDS)
        if code:
            rows.append({"shape": name, "operator": "process", "error": f"exit code {code}: {err}"})
        return rows

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(one, shapes) for row in rows]


def all_times(deadline: float) -> list[dict[str, Any]]:
    """Every section; after a lost context the sections behind the one that lost it run in a new process."""
    left, found = sections(), []
    while left and time.time() < deadline:
        code, rows, err = child(
            "--sections", ",".join(left), "--deadline", str(deadline), timeout=deadline - time.time() + 5
        )
        started = [row["section"] for row in rows if row.get("section")]
        found += [row for row in rows if "section" not in row]
        if code == 0 or code == -1:
            break
        last = started[-1] if started else left[0]
        if code != LOST:
            found.append({"problem": last, "case": "process", "timing": None, "num_bytes": 0, "error": err})
        left = left[left.index(last) + 1 :]
    return found


def conditions() -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "command": " ".join(["python -m prhs_kernels.bench.gpu_check", *sys.argv[1:]]),
    }


def add_ratios(rows: list[dict[str, Any]]) -> float:
    """Add `floor_fraction` (floor over time) and `over_dense` (fastest dense over time); bytes per us."""
    copies = [row for row in rows if row["case"] == "copy" and row["timing"]]
    rate = copies[0]["num_bytes"] / copies[0]["timing"]["p50"] if copies else 0.0
    dense: dict[str, float] = {}
    for row in rows:
        if row["timing"] and (row["case"] == "dense_decode" or row["case"].startswith("sdpa")):
            dense[row["problem"]] = min(dense.get(row["problem"], float("inf")), row["timing"]["p50"])
    for row in rows:
        if row["timing"]:
            spent = row["timing"]["p50"]
            row["floor_fraction"] = row["num_bytes"] / rate / spent if rate else None
            row["over_dense"] = dense[row["problem"]] / spent if row["problem"] in dense else None
    return rate


def report(result: dict[str, Any]) -> None:
    """The short table."""
    bad = [row for row in result["checks"] if row["error"]]
    print(f"{len(result['checks'])} checks, {len(bad)} wrong, on {result['conditions']['device']}")
    for row in bad:
        print(f"  WRONG {row['shape']} {row['operator']}: {row['error']}")
    print(f"copy bandwidth {result['copy_gb_per_s']:.0f} GB/s")
    problem = ""
    for row in result["times"]:
        if row["problem"] != problem:
            problem = row["problem"]
            print(f"{problem}\n  {'case':40} {'us':>9} {'floor':>6} {'x dense':>8}")
        if row["timing"] is None:
            print(f"  {row['case']:40} failed: {row['error'][:120]}")
        else:
            over = f"{row['over_dense']:8.2f}" if row["over_dense"] else " " * 8
            print(f"  {row['case']:40} {row['timing']['p50']:9.1f} {row['floor_fraction'] or 0:6.2f} {over}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels on the GPU at hand.")
    parser.add_argument("--seconds", type=float, default=110, help="time for all of it")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--sections", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not has_triton() or (DEVICE == "cpu" and not interpreted()):
        print(
            "needs triton and a CUDA device (or TRITON_INTERPRET=1 for a trial at toy size)", file=sys.stderr
        )
        return 4
    if options.check:
        run_checks(options.check)
        return 0
    if options.sections:
        return run_sections(options.sections.split(","), options.deadline)
    deadline = time.time() + options.seconds
    result: dict[str, Any] = {"kind": "gpu-check", "schema": 1, "conditions": conditions()}
    result["checks"] = all_checks()
    result["times"] = all_times(deadline)
    result["copy_gb_per_s"] = add_ratios(result["times"]) / 1e3
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return int(any(row["error"] for row in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())

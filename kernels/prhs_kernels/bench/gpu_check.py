"""Is every operator right on the GPU at hand?

`python -m prhs_kernels.bench.gpu_check [--seconds N] [--json OUT]`

Each shape runs in a process of its own, all at once: compiling takes longer than checking, and a failure that
costs one process its device leaves the others alone. Times come from `prhs bench`. Without a GPU, and with
`TRITON_INTERPRET=1`, it runs at toy size.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prhs_kernels.bench import checks
from prhs_kernels.bench.session import choose_device, device_name
from prhs_kernels.errors import PrhsError


def check(name: str, device: str) -> None:
    """Child: the operators at one shape, a line of JSON each."""
    shape = next(shape for shape in shapes(device) if str(shape) == name)
    for operator, wrong in checks.check(shape, device, toy=device == "cpu"):
        print(json.dumps({"shape": name, "operator": operator, "error": wrong}), flush=True)


def shapes(device: str) -> list[checks.Shape]:
    """Most important first."""
    return checks.TOY_SHAPES if device == "cpu" else checks.SHAPES


def child(name: str, timeout: float) -> list[dict[str, Any]]:
    """Check one shape in a process of its own; what goes wrong with the process is a row too."""
    command = [sys.executable, "-W", "ignore", "-m", "prhs_kernels.bench.gpu_check", "--check", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, timeout))
        code, out, problem = (
            done.returncode,
            done.stdout,
            f"exit code {done.returncode}: {done.stderr[-500:]}",
        )
    except subprocess.TimeoutExpired as late:
        code, problem = -1, "out of time"
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    rows = [
        json.loads(line) for line in out.splitlines() if line.startswith('{"shape"') and line.endswith("}")
    ]
    return rows + ([{"shape": name, "operator": "process", "error": problem}] if code else [])


def check_all(device: str, seconds: float) -> list[dict[str, Any]]:
    """Every shape."""
    names = [str(shape) for shape in shapes(device)]
    workers = min(len(names), max(1, (os.cpu_count() or 1) // (2 if device == "cpu" else 1)))
    deadline = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda name: child(name, deadline - time.monotonic()), names)
        return [row for rows in found for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if everything is right, 1 if something is wrong, 4 without a device."""
    parser = argparse.ArgumentParser(description="Check every operator on the GPU at hand.")
    parser.add_argument("--seconds", type=float, default=300, help="time for all of it")
    parser.add_argument("--json", type=Path, help="where to write every row")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        device = choose_device("auto")
    except PrhsError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 4
    if options.check:
        check(options.check, device)
        return 0
    rows = check_all(device, options.seconds)
    bad = [row for row in rows if row["error"]]
    print(f"{len(rows)} checks, {len(bad)} wrong, on {device_name(device)}")
    for row in bad:
        print(f"  WRONG {row['shape']} {row['operator']}: {row['error']}")
    if options.json:
        conditions = {"device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda}
        result = {"kind": "gpu-check", "schema": 1, "conditions": conditions, "data": {"checks": rows}}
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

"""One run of a benchmark: where it runs, which rows it has already, when it has to stop."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prhs_kernels.errors import ResourceError, UsageError
from prhs_kernels.ops.backend import has_triton, interpreted

Record = dict[str, Any]  # a row as plain JSON; "key" identifies it
Progress = Callable[[str, int, int], None]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONTEXT_LOST = ("CUDA error", "AcceleratorError", "illegal memory access")


class Session:
    """Finished rows by key. `keep` adds one and has all written, so that nothing is measured twice."""

    def __init__(
        self,
        rows: list[Record],
        write: Callable[[list[Record]], object],
        *,
        seconds: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._rows = {row["key"]: row for row in rows}
        self._write = write
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.progress = progress or (lambda stage, done, total: None)

    @property
    def rows(self) -> list[Record]:
        return list(self._rows.values())

    def has(self, key: str) -> bool:
        return key in self._rows

    def keep(self, row: Record) -> None:
        """Add a row and write all.

        Raises:
            ResourceError: the row says that the device's context is gone; nothing can run in this process.
        """
        self._rows[row["key"]] = row
        self._write(self.rows)
        if any(mark in row.get("error", "") for mark in CONTEXT_LOST):
            raise ResourceError(
                f"the device failed in {row['key']} ({row['error']}); the row is kept, "
                "the same command goes on with the cases after it"
            )

    def out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def choose_device(asked: str) -> str:
    """`cuda` (made the current one) or, in triton's interpreter, `cpu`.

    Raises:
        ResourceError: no CUDA device or no triton. UsageError: a device that is not there, or the CPU.
    """
    kind = asked.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {asked!r} is not known; give auto or cuda:N")
    if not has_triton():
        raise ResourceError(
            "prhs bench needs the package triton, which the CUDA build of torch brings; install that one, or "
            "for a trial on a CPU (TRITON_INTERPRET=1) triton itself: pip install -c constraints.txt triton"
        )
    if interpreted():
        if kind == "cuda":
            raise UsageError(
                f"device {asked!r}: TRITON_INTERPRET=1 runs on the CPU; unset it or use --device cpu"
            )
        return "cpu"
    if kind == "cpu":
        raise UsageError(
            f"device {asked!r} is not a CUDA device; TRITON_INTERPRET=1 tries the benchmark on a CPU"
        )
    if not torch.cuda.is_available():
        raise ResourceError(
            "prhs bench needs a CUDA device, none is available; TRITON_INTERPRET=1 runs a trial at toy size"
        )
    number = asked.partition(":")[2] or str(torch.cuda.current_device())
    if not number.isdigit() or int(number) >= torch.cuda.device_count():
        raise UsageError(f"device {asked!r}: there are {torch.cuda.device_count()}, counted from cuda:0")
    torch.cuda.set_device(int(number))
    return "cuda"


def choose_dtype(asked: str, device: str) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16, float16 in the interpreter."""
    if asked == "auto":
        return torch.float16 if device == "cpu" else torch.bfloat16
    if asked not in DTYPES:
        raise UsageError(f"dtype {asked!r} is not one of auto, {', '.join(DTYPES)}")
    if asked == "bfloat16" and device == "cpu":
        raise UsageError("dtype bfloat16: triton's interpreter computes it wrongly; use float16 or float32")
    return DTYPES[asked]


def device_name(device: str) -> str:
    """For the conditions of a result."""
    return "CPU, triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()


def free_bytes(device: str) -> int | None:
    """Free memory of the device; None where it is not limited."""
    if device == "cpu":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@functools.cache
def source_hash() -> str:
    """12 hexadecimal digits that change with any source file of this package: which code was measured."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]

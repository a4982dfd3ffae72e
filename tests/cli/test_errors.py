"""Exceptions become one line and the right exit code."""

from __future__ import annotations

import errno

import pytest
import typer

from prhs_cli import errors
from prhs_kernels.errors import InputError, PrhsError, ResourceError, UnsupportedModelError, UsageError


class OutOfMemoryError(RuntimeError):
    """Stands for torch's class of the same name."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("δ = 2"), 2, "δ = 2"),
        (InputError("bundle x"), 3, "bundle x"),
        (UnsupportedModelError("model y"), 3, "model y"),
        (PrhsError("z"), 3, "z"),
        (ResourceError("no memory"), 4, "no memory"),
        (MemoryError(), 4, "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried …"), 4, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 4, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 4, "/x/y"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 4, "free some space"),
        (ValueError("I/O error: No space left on device (os error 28)"), 4, "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 3, "permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/q"), 3, "/q"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),  # what some releases of Typer make of it
        (errors.Interrupted("interrupted: no bundle was written"), 130, "no bundle"),
        (ZeroDivisionError("division by zero"), 70, "--debug"),
    ],
)
def test_exit_code_and_line(error: BaseException, code: int, words: str) -> None:
    found, line = errors.describe(error)
    assert found == code
    assert words in line


def test_line_stays_one_line() -> None:
    for error in (InputError("a\nb"), RuntimeError("first\nsecond\n" * 50)):
        assert "\n" not in errors.describe(error)[1]


def test_no_ordinary_failure_looks_like_a_verdict() -> None:
    """Exit code 1 says that a bound was violated; nothing else may."""
    assert errors.VIOLATED not in {rule.exit_code for rule in errors.RULES}
    assert errors.INTERNAL != errors.VIOLATED

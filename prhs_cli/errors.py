"""The one table from exceptions to exit codes and remedies. Nothing here prints or exits."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable

import typer

from prhs_kernels.errors import InputError, PrhsError, ResourceError, UsageError

VIOLATED = 1
USAGE = 2
INPUT = 3
RESOURCE = 4
INTERNAL = 70  # EX_SOFTWARE of sysexits.h: must not look like a verdict
INTERRUPTED = 130
BROKEN_PIPE = 141


class Interrupted(PrhsError):
    """Ctrl-C; the message says what became of the work done so far."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: which exceptions it covers, the exit code, and the line the user reads."""

    covers: Callable[[BaseException], bool]
    exit_code: int
    line: Callable[[BaseException], str]


def describe(error: BaseException) -> tuple[int, str]:
    """Return `(exit code, one line)` for any exception; the first row that covers it wins."""
    for rule in RULES:
        if rule.covers(error):
            return rule.exit_code, " ".join(rule.line(error).split())
    return INTERNAL, (
        f"internal error, please report it: {type(error).__name__}: {' '.join(str(error).split())[:300]} "
        "(run again with --debug for the traceback)"
    )


def _is(*types: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, types)


def _errno(*codes: int) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, OSError) and error.errno in codes


def _says(*texts: str) -> Callable[[BaseException], bool]:
    """Libraries that report the system's errors as text in types of their own."""
    return lambda error: any(text in str(error) for text in texts)


def _parser(error: BaseException) -> bool:
    """Typer's own usage errors. Their class moved between Typer releases; their interface did not."""
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == USAGE


def _parser_line(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "prhs"
    message = error.format_message().replace("Value error, ", "").rstrip(".")  # type: ignore[attr-defined]
    see = f" See {command} --help" if message.endswith("?") else f"; see {command} --help"
    return message[:1].lower() + message[1:] + see


def _os_line(remedy: str) -> Callable[[BaseException], str]:
    def line(error: BaseException) -> str:
        what = getattr(error, "strerror", None) or str(error)
        where = getattr(error, "filename", None)
        return f"{what}{f': {where}' if where else ''}; {remedy}"

    return line


RULES = (
    Rule(_is(Interrupted, KeyboardInterrupt, typer.Abort), INTERRUPTED, lambda e: str(e) or "interrupted"),
    Rule(_is(UsageError), USAGE, str),
    Rule(_is(ResourceError), RESOURCE, str),
    Rule(_is(InputError, PrhsError), INPUT, str),
    Rule(_parser, USAGE, _parser_line),
    Rule(_is(BrokenPipeError), BROKEN_PIPE, lambda e: ""),
    Rule(
        _errno(errno.ENOSPC, errno.EDQUOT),
        RESOURCE,
        _os_line("free some space or write elsewhere with --output; nothing half-written is left behind"),
    ),
    Rule(
        _says("os error 28", "No space left on device"),
        RESOURCE,
        lambda e: "no space left on device; free some space or write elsewhere with --output",
    ),
    Rule(
        _is(MemoryError),
        RESOURCE,
        lambda e: "out of memory; use a smaller model, --context-length or --prompts, or --dtype bfloat16",
    ),
    Rule(
        lambda e: type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(e),
        RESOURCE,
        lambda e: "out of memory; use a smaller model, --context-length or --prompts, or --dtype bfloat16",
    ),
    Rule(
        _errno(errno.EACCES, errno.EPERM, errno.EROFS),
        INPUT,
        _os_line("check the permissions or choose another path"),
    ),
    Rule(_is(OSError), INPUT, _os_line("check the path and try again")),
)

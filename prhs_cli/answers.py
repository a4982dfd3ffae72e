"""Where the texts of many prompts go: to the screen in input order, or line by line into a JSONL file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prhs_calibration.files import atomic_write, check_writable
from prhs_calibration.results import to_json
from prhs_cli.output import Output
from prhs_kernels.errors import InputError
from prhs_kernels.runtime.distributed import from_rank_zero, launched

Answer = Mapping[str, Any]  # one object per prompt; "id" and "request" identify it


class AnswerFile:
    """A JSONL file that grows by one synced line per finished prompt, and continues where it was left.

    A line that a killed process left unfinished is made again. Of several ranks only rank 0 reads and writes
    it. Raises InputError for a file that cannot be written, or is not one of these; ResourceError when the
    disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self._passive = launched().rank > 0
        if self._passive:
            return
        check_writable(path)  # first of all: a device has no end to read to
        whole = not path.exists() or self._read()
        if not whole:
            self._rewrite(self.answers)

    def finished(self, requests: Mapping[str, str]) -> set[str]:
        """Ids that are in the file already; InputError if one was made from another request."""
        known = [name for name in requests if name in self.answers]
        for name in known:
            if self.answers[name].get("request") != requests[name]:
                raise InputError(
                    f"{self.path} has an answer to {name!r} from another prompt or with other settings "
                    "(model, bundle, δ, limits, sampling, …); give another --output or move the file away"
                )
        return from_rank_zero(set(known))

    def add(self, answer: Answer) -> None:
        """Append one line; it is on the disk when this returns, or not in the file at all."""
        if self._passive:
            return
        line = (to_json(answer, indent=None) + "\n").encode()
        with self.path.open("ab") as file:
            size = file.seek(0, os.SEEK_END)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
        self.answers[str(answer["id"])] = answer

    def sort(self, ids: Sequence[str]) -> None:
        """Put the lines into this order, those of other prompts behind them; the file is replaced whole."""
        if self._passive:
            return
        order = {name: self.answers[name] for name in ids if name in self.answers}
        self._rewrite(order | self.answers)

    def _read(self) -> bool:
        """Fill `answers`; False when the last line is unfinished."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise InputError(f"cannot read {self.path}: {reason}; give another --output") from None
        for number, line in enumerate(lines[:-1], start=1):
            try:
                answer = json.loads(line)
                self.answers[answer["id"]] = answer
                answer["request"]
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{self.path} line {number} was not written by `prhs generate`; give another --output"
                ) from None
        return not lines[-1]

    def _rewrite(self, answers: Mapping[str, Answer]) -> None:
        atomic_write(
            self.path, "".join(to_json(answer, indent=None) + "\n" for answer in answers.values()).encode()
        )


class Screen:
    """Prints each answer once every earlier one has been printed; `flush` prints what waits, at the end."""

    def __init__(self, out: Output, ids: Sequence[str]) -> None:
        self._out, self._ids = out, list(ids)
        self._waiting: dict[str, Answer] = {}

    def add(self, answer: Answer) -> None:
        self._waiting[str(answer["id"])] = answer
        while self._ids and self._ids[0] in self._waiting:
            self._print(self._waiting.pop(self._ids.pop(0)))

    def flush(self) -> None:
        """Print what waits for prompts that will not be finished."""
        for name in [name for name in self._ids if name in self._waiting]:
            self._print(self._waiting.pop(name))

    def _print(self, answer: Answer) -> None:
        self._out.line(answer, *_blocks(answer))


def _blocks(answer: Answer) -> list[str]:
    variants = [name for name in ("sparse", "dense") if name in answer]
    blocks = [f"=== {answer['id']} ==="]
    for name in variants:
        blocks += [f"--- {name} ---"] * (len(variants) > 1) + [answer[name]["text"]]
    return blocks

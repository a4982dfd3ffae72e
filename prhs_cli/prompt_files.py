"""Prompt files: one text, texts separated by lines `---`, or JSONL; every error names its line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.runtime.distributed import launched

SEPARATOR = "---"
KEYS = ("prompt", "messages", "id", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One text to continue, or the messages of one chat (then `text` is None).

    where: how errors call it, for example `questions.jsonl line 3`. max_new_tokens: its own limit, if any.
    """

    id: str
    where: str
    text: str | None
    messages: tuple[Mapping[str, str], ...] = ()
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """All prompts of a file in its order. ignored: keys of its objects that mean nothing here."""

    prompts: tuple[Prompt, ...]
    is_text: bool  # one plain text: streamed, not listed
    ignored: tuple[str, ...] = ()


def read_prompts(source: str) -> PromptFile:
    """Prompts of the file `source`, or of standard input for `-`.

    A name that ends in `.jsonl` holds one JSON object per line: "prompt" (text) or "messages" (objects with
    "role" and "content"), optional "id" and "max_new_tokens". Any other file is one text, or several
    separated by lines that are exactly `---`; the line break before a separator and the last one of the
    file belong to no text then. Raises InputError, naming the line.
    """
    if source == "-" and launched().size > 1:
        raise UsageError("standard input does not reach every rank; give --prompt-file the name of a file")
    name = "standard input" if source == "-" else f"prompt file {source}"
    text = _read(source, name)
    if not text.strip():
        raise InputError(f"{name} is empty; put the text to continue into it")
    if source.lower().endswith(".jsonl"):
        return _read_objects(text, source)
    if all(line.rstrip("\r") != SEPARATOR for line in text.split("\n")):
        return PromptFile((Prompt("1", "the prompt", text),), is_text=True)
    return PromptFile(tuple(_split(text, name)), is_text=False)


def _read(source: str, name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        raise InputError(f"cannot read {name}: {reason}; check the path") from None


def _split(text: str, name: str) -> list[Prompt]:
    parts: list[tuple[int, list[str]]] = [(1, [])]  # number of the first line, lines
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.rstrip("\r") == SEPARATOR:
            parts.append((number + 1, []))
        else:
            parts[-1][1].append(line)
    if not "".join(parts[-1][1]).strip():
        parts.pop()  # a separator at the end
    prompts = []
    for index, (first, part) in enumerate(parts, start=1):
        content = "\n".join(part)
        where = f"{name}, prompt {index} (line {first})"
        if not content.strip():
            raise InputError(f"{where} is empty; put a text there or remove one of the lines {SEPARATOR}")
        prompts.append(Prompt(str(index), where, content))
    return prompts


def _read_objects(text: str, source: str) -> PromptFile:
    prompts: list[Prompt] = []
    first_use: dict[str, str] = {}
    ignored: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        content = _parse(line, where)
        ignored |= dict.fromkeys(key for key in content if key not in KEYS)
        prompt = _prompt(content, str(len(prompts) + 1), where)
        if prompt.id in first_use:
            raise InputError(f"{where}: the id {prompt.id!r} is that of {first_use[prompt.id]}; change one")
        first_use[prompt.id] = where
        prompts.append(prompt)
    return PromptFile(tuple(prompts), is_text=False, ignored=tuple(ignored))


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
        line.encode()
        json.dumps(content, ensure_ascii=False).encode()  # finds escaped halves of surrogate pairs
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a character (an unpaired surrogate); repair the text") from None
    except (ValueError, RecursionError) as error:
        detail = "unreadable"
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg.lower()}, column {error.colno}"
        raise InputError(f"{where} is not JSON: {detail}; JSONL is one object per line") from None
    if not isinstance(content, dict) or ("prompt" in content) == ("messages" in content):
        raise InputError(f'{where} must be an object with either "prompt" or "messages"')
    return content


def _prompt(content: dict[str, Any], default_id: str, where: str) -> Prompt:
    name = content.get("id", default_id)
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise InputError(f'{where}: "id" must be a text or a whole number, not {name!r}')
    limit = content.get("max_new_tokens")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f'{where}: "max_new_tokens" must be a whole number of at least 1, not {limit!r}')
    if "messages" in content:
        return Prompt(str(name), where, None, _messages(content["messages"], where), limit)
    text = content["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: "prompt" must be a text that is not empty')
    return Prompt(str(name), where, text, (), limit)


def _messages(content: Any, where: str) -> tuple[Mapping[str, str], ...]:
    whole = isinstance(content, list) and bool(content)
    for message in content if whole else [None]:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(part, str) and part for part in texts):
            raise InputError(f'{where}: "messages" must be a list of objects with texts "role" and "content"')
    return tuple(content)

"""Prompt files into token ids, and token ids back into text as they come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prhs_kernels.errors import InputError


def read_prompt(source: str) -> str:
    """Text of the file `source`, or of standard input for `-`; InputError unless it is UTF-8, not empty."""
    name = "standard input" if source == "-" else f"prompt file {source}"
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        raise InputError(f"cannot read {name}: {reason}; check the path") from None
    if not text.strip():
        raise InputError(f"{name} is empty; put the text to continue into it")
    return text


def encode_prompt(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    """Token ids of the prompt: through the chat template when the tokenizer has one, unless `raw`."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # the template writes the special tokens itself
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def new_token_limit(prompt_tokens: int, asked: int, context_length: int) -> int:
    """How many tokens may follow; InputError when the prompt alone does not fit the model's context."""
    if prompt_tokens >= context_length:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens and the model a context of {context_length}; "
            f"shorten the prompt to at most {context_length - 1} or choose a model with a longer context"
        )
    return min(asked, context_length - prompt_tokens)


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end the text: those of the generation config, else of the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = configured if configured is not None else getattr(tokenizer, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


class Detokenizer:
    """Turns a growing list of token ids into pieces of text, without ever splitting a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # what is decoded again with every token: enough to know about spaces between words
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a multi-byte character is unfinished."""
        self._ids.append(token)
        before, now = self._decode(self._shown), self._decode(len(self._ids))
        if now.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left at the end, incomplete characters included."""
        return self._decode(len(self._ids))[len(self._decode(self._shown)) :]

    def _decode(self, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True))

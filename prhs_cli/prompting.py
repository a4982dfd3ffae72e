"""Prompts into token ids, and token ids back into text as they come."""

from __future__ import annotations

from typing import Any

from prhs_cli.prompt_files import Prompt
from prhs_kernels.errors import InputError


def encode_prompt(tokenizer: Any, prompt: Prompt, *, raw: bool) -> list[int]:
    """Token ids of the prompt: through the chat template when the tokenizer has one, unless `raw`.

    Raises InputError for messages without a template, messages that the template refuses, and a text of which
    the tokenizer leaves nothing.
    """
    ids = _encode(tokenizer, prompt, raw)
    if not ids:
        raise InputError(
            f"{prompt.where} has no tokens: the tokenizer leaves nothing of it; write another text"
        )
    return ids


def _encode(tokenizer: Any, prompt: Prompt, raw: bool) -> list[int]:
    template = None if raw else getattr(tokenizer, "chat_template", None)
    if not template and prompt.text is not None:
        return list(tokenizer(prompt.text)["input_ids"])
    if not template:
        reason = "--raw was given" if raw else "this model's tokenizer has none"
        raise InputError(
            f'{prompt.where} has "messages", which need a chat template, and {reason}; give "prompt"'
        )
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    try:
        rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the chat template refuses {prompt.where}: {reason}; change it, or give plain text with --raw"
        ) from error
    # the template writes the special tokens itself
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def new_token_limit(prompt_tokens: int, asked: int, context_length: int, where: str = "the prompt") -> int:
    """How many tokens may follow; InputError when the prompt alone does not fit the model's context."""
    if prompt_tokens >= context_length:
        raise InputError(
            f"{where} has {prompt_tokens} tokens and the model a context of {context_length}; "
            f"shorten it to at most {context_length - 1} or choose a model with a longer context"
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

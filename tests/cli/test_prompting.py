"""Prompts to tokens and back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prhs_cli.prompt_files import Prompt
from prhs_cli.prompting import Detokenizer, encode_prompt, new_token_limit, stop_token_ids
from prhs_kernels.errors import InputError
from prhs_kernels.testing.models import tiny_tokenizer


class ByteTokenizer:
    """One token per byte: characters outside ASCII span several tokens."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


def test_characters_are_never_split() -> None:
    text = "naïve – 注意力 🙂!"
    words = Detokenizer(ByteTokenizer())
    pieces = [words.add(token) for token in text.encode()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert words.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    words = Detokenizer(ByteTokenizer())
    assert [words.add(token) for token in "a🙂".encode()[:-1]] == ["a", "", "", ""]
    assert "\ufffd" in words.finish()


class WordTokenizer:
    """Like SentencePiece: the space before a word shows only when something precedes it."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(f"word{token}" for token in ids)


def test_spaces_between_words_survive() -> None:
    words = Detokenizer(WordTokenizer())
    assert "".join(words.add(token) for token in range(4)) == "word0 word1 word2 word3"


HELLO = Prompt("1", "p.jsonl line 1", "hello")
TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}A:"
)


def test_messages_need_a_chat_template_that_takes_them() -> None:
    tokenizer: Any = tiny_tokenizer()
    talk = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})
    chat = Prompt("1", "p.jsonl line 4", None, talk)
    with pytest.raises(InputError, match="p.jsonl line 4 has .messages.*tokenizer has none"):
        encode_prompt(tokenizer, chat, raw=False)
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(encode_prompt(tokenizer, chat, raw=False)) == "[user]hi[assistant]yesA:"
    with pytest.raises(InputError, match="p.jsonl line 4 has .messages.*--raw"):
        encode_prompt(tokenizer, chat, raw=True)
    with pytest.raises(InputError, match="template refuses p.jsonl line 9: no tools"):
        refused = Prompt("2", "p.jsonl line 9", None, ({"role": "tool", "content": "x"},))
        encode_prompt(tokenizer, refused, raw=False)


def test_a_text_that_vanishes_is_refused() -> None:
    def vanishing(text: str) -> dict[str, list[int]]:
        return {"input_ids": []}

    with pytest.raises(InputError, match="line 1 has no tokens"):
        encode_prompt(vanishing, HELLO, raw=True)


def test_chat_template_is_used_unless_raw() -> None:
    tokenizer: Any = tiny_tokenizer()
    plain = encode_prompt(tokenizer, HELLO, raw=False)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}A:"
    assert tokenizer.decode(encode_prompt(tokenizer, HELLO, raw=False)) == "[user]helloA:"
    assert encode_prompt(tokenizer, HELLO, raw=True) == plain


def test_context_limits_the_new_tokens() -> None:
    assert new_token_limit(100, 50, 512) == 50
    assert new_token_limit(500, 50, 512) == 12
    for prompt in (512, 600):
        with pytest.raises(InputError, match=f"line 7 has {prompt} tokens .* shorten it to at most 511"):
            new_token_limit(prompt, 50, 512, "line 7")


@pytest.mark.parametrize(
    ("configured", "own", "expected"), [(None, None, ()), (None, 2, (2,)), (5, 2, (5,)), ([5, 6], 2, (5, 6))]
)
def test_stop_tokens(configured: Any, own: int | None, expected: tuple[int, ...]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert stop_token_ids(model, SimpleNamespace(eos_token_id=own)) == expected

"""One text, several texts, JSONL: what is read, and that every error names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prhs_cli.prompt_files import read_prompts
from prhs_kernels.errors import InputError


def written(folder: Path, content: str, name: str = "prompts.txt") -> str:
    path = folder / name
    path.write_bytes(content.encode("utf-8"))
    return str(path)


def test_a_text_without_separators_is_one_prompt_untouched(tmp_path: Path) -> None:
    text = "first\n----\n --- \n---x\nlast\n\n"
    found = read_prompts(written(tmp_path, text))
    assert found.is_text and [prompt.text for prompt in found.prompts] == [text]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_of_three_dashes_separate_prompts(tmp_path: Path, newline: str) -> None:
    text = newline.join(["one", "more of one", "---", "two", "", "---", "three", "---", ""])
    found = read_prompts(written(tmp_path, text))
    assert not found.is_text
    kept = [(prompt.id, (prompt.text or "").replace("\r", "")) for prompt in found.prompts]
    assert kept == [("1", "one\nmore of one"), ("2", "two\n"), ("3", "three")]


def test_one_prompt_before_a_separator_is_still_a_list(tmp_path: Path) -> None:
    assert not read_prompts(written(tmp_path, "one\n---\n")).is_text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one\n---\n \n\n---\nthree", "prompt 2 (line 3) is empty"),
        ("---\none", "prompt 1 (line 1) is empty"),
        ("one\n---\n---\n", "prompt 2 (line 3) is empty"),
    ],
)
def test_an_empty_prompt_between_others_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_prompts(written(tmp_path, text))
    assert words in str(error.value) and "prompts.txt" in str(error.value)


def test_jsonl(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    objects = [
        {"prompt": "a", "id": 17, "answer": 3},
        {"messages": talk, "max_new_tokens": 5, "answer": 4, "source": ""},
        {"prompt": "ünï\ncode", "id": "x"},
    ]
    text = "\ufeff" + json.dumps(objects[0]) + "\n\n" + json.dumps(objects[1]) + "\n" + json.dumps(objects[2])
    path = written(tmp_path, text, "p.JSONL")
    found = read_prompts(path)
    first, second, third = found.prompts
    assert (first.id, first.text, first.max_new_tokens, first.where) == ("17", "a", None, f"{path} line 1")
    assert (second.id, second.text, second.messages, second.max_new_tokens) == ("2", None, tuple(talk), 5)
    assert (third.id, third.text, third.where) == ("x", "ünï\ncode", f"{path} line 4")
    assert found.ignored == ("answer", "source") and not found.is_text


GOOD = '{"prompt": "a"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "b"', "line 2 is not JSON: expecting ',' delimiter, column 15"),
        ("b", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["b"]', 'line 2 must be an object with either "prompt" or "messages"'),
        ('{"text": "b"}', 'line 2 must be an object with either "prompt" or "messages"'),
        ('{"prompt": "b", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": " "}', 'line 2: "prompt" must be a text that is not empty'),
        ('{"prompt": 3}', 'line 2: "prompt" must be a text'),
        ('{"prompt": "\\ud83d"}', "line 2 holds half a character"),
        ('{"messages": []}', 'line 2: "messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"role" and "content"'),
        ('{"messages": ["hi"]}', '"role" and "content"'),
        ('{"prompt": "b", "id": null}', 'line 2: "id" must be a text or a whole number, not None'),
        ('{"prompt": "b", "id": true}', "not True"),
        ('{"prompt": "b", "id": ""}', '"id" must be'),
        ('{"prompt": "b", "max_new_tokens": 0}', 'line 2: "max_new_tokens" must be a whole number'),
        ('{"prompt": "b", "max_new_tokens": 1.5}', "not 1.5"),
        ('{"prompt": "b", "id": "1"}', "line 2: the id '1' is that of"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n", "p.jsonl")
    with pytest.raises(InputError) as error:
        read_prompts(path)
    assert words in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(path)

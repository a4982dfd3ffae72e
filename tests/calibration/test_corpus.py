"""Prompts: exact lengths, disjoint splits, determinism, planted facts, users' own text."""

import json
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from prhs_calibration import corpus, planting
from prhs_calibration.reference_model import reference_path
from prhs_calibration.reference_model.recall import NAMES
from prhs_kernels.errors import InputError, UsageError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(reference_path()))


class CharacterTokenizer:
    """As far from BPE as can be: one token per character, no special tokens."""

    def __call__(self, text, *, verbose=True):
        return SimpleNamespace(input_ids=list(map(ord, text)))

    def decode(self, ids):
        return "".join(map(chr, ids))


def shingles(prompt, size=48):
    """Runs of tokens that only shared text can have in common."""
    ids = prompt.input_ids
    return {tuple(ids[i : i + size]) for i in range(len(ids) - size)}


def test_largest_asked_for_counts_fit_without_overlap(tokenizer):
    for split, count in (("fit", 64), ("select", 256), ("verify", 400)):
        prompts = corpus.build(tokenizer, count=count, context_length=2048, seed=3, split=split)
        assert len({prompt.text_hash for prompt in prompts}) == count
        lengths = [len(prompt.input_ids) for prompt in prompts]
        assert min(lengths) >= 512 and max(lengths) <= 2048
        assert 1150 < sum(lengths) / count < 1420  # uniform on 512..2048: mean 1280, standard error < 56
        for kind, share in planting.KINDS.items():
            found = sum(prompt.kind == kind for prompt in prompts) / count
            assert abs(found - share) < 4 * (share * (1 - share) / count) ** 0.5, kind
        assert all(len(prompt.input_ids) - prompt.prefill_length == 64 for prompt in prompts)


def test_long_contexts_are_filled_up_with_records(tokenizer):
    """128 prompts of up to 8,192 tokens hold more than the split's text; none of it is used twice."""
    prompts = corpus.build(tokenizer, count=128, context_length=8192, seed=0, split="select")
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert max(lengths) <= 8192 and 3900 < sum(lengths) / 128 < 4800  # mean 4352, standard error < 200
    long = [prompt for prompt in prompts if len(prompt.input_ids) > 4096]
    text = {tuple(ids) for prompt in long for ids in text_lines(tokenizer, prompt)}
    assert all(text_lines(tokenizer, prompt) for prompt in long)
    used = [sum(map(len, text_lines(tokenizer, prompt))) for prompt in long]
    assert max(used) <= 1.1 * planting.TEXT_TOKENS and min(used) > 0.15 * planting.TEXT_TOKENS
    repeated = sum(map(len, (line for p in long for line in text_lines(tokenizer, p))))
    assert sum(map(len, text)) > 0.9 * repeated


def text_lines(tokenizer, prompt):
    """Token ids of the prompt's lines that stand in the built-in text, long enough to be told apart."""
    lines = tokenizer.decode(prompt.input_ids).splitlines()
    found = [line for line in lines if len(line) > 30 and line in built_in_lines()]
    return [tokenizer(line).input_ids for line in found]


@lru_cache
def built_in_lines():
    return frozenset(corpus.built_in_text().splitlines())


def test_a_copied_passage_was_stated_before(tokenizer):
    made = corpus.build(tokenizer, count=40, context_length=1500, seed=1, split="fit")
    copies = [prompt for prompt in made if prompt.kind == "copy"]
    assert len(copies) > 3
    for prompt in copies:
        stated = tokenizer.decode(prompt.input_ids[: prompt.prefill_length])
        words = tokenizer.decode(prompt.input_ids[prompt.prefill_length :]).split()
        passage = " ".join(words[-15:])
        assert passage in stated, "the decode steps repeat a passage word by word"


@pytest.mark.parametrize("length", [150, 400])
def test_prompts_too_short_for_what_is_planted_are_text(tokenizer, length):
    made = corpus.build(tokenizer, count=30, context_length=length, seed=1, split="fit", decode_steps=32)
    assert all(len(prompt.input_ids) <= length for prompt in made)
    assert {prompt.kind for prompt in made} <= set(planting.KINDS)


def test_splits_share_no_text_even_with_other_seeds_and_lengths(tokenizer):
    made = [
        corpus.build(tokenizer, count=20, context_length=length, seed=seed, split=split)
        for split, seed, length in (("fit", 0, 1024), ("select", 1, 2048), ("verify", 2, 700))
    ]
    runs = [set().union(*map(shingles, prompts)) for prompts in made]
    # The library repeats itself a little (boiler plate); sharing a region would share thousands of runs.
    assert all(len(one & other) < 0.01 * min(len(one), len(other)) for one, other in combinations(runs, 2))
    again = corpus.build(tokenizer, count=20, context_length=2048, seed=5, split="verify")
    more = corpus.build(tokenizer, count=400, context_length=2048, seed=2, split="verify")
    runs = [set().union(*map(shingles, prompts)) for prompts in (again, more)]
    assert len(runs[0] & runs[1]) > 0.1 * len(runs[0])  # the measure does see shared regions


def test_prompts_of_one_split_do_not_overlap(tokenizer):
    prompts = corpus.build(tokenizer, count=40, context_length=1024, seed=0, split="select")
    runs = [shingles(prompt) for prompt in prompts]
    assert len(set().union(*runs)) > 0.98 * sum(map(len, runs))


def test_short_prompts_are_built_too(tokenizer):
    for context_length, steps in ((40, 8), (100, 16), (200, 64)):
        prompts = corpus.build(
            tokenizer, count=20, context_length=context_length, seed=0, split="select", decode_steps=steps
        )
        assert all(steps < len(prompt.input_ids) <= context_length for prompt in prompts)


def test_regions_are_dealt_once_each():
    dealt = corpus._dealt(567)
    assert sorted(sum(dealt.values(), [])) == list(range(567))
    assert [len(part) for part in dealt.values()] == [57, 204, 306]


def test_same_arguments_same_prompts(tokenizer):
    def draw(seed):
        return corpus.build(tokenizer, count=5, context_length=600, seed=seed, split="fit")

    assert draw(0) == draw(0)
    assert corpus.corpus_hash(draw(0)) == corpus.corpus_hash(draw(0)[::-1])
    assert corpus.corpus_hash(draw(0)) != corpus.corpus_hash(draw(1))


@pytest.mark.parametrize("kind", ["reference", "characters"])
def test_question_and_answer_lie_in_the_decode_steps_and_the_fact_before(tokenizer, kind):
    tokenizer = tokenizer if kind == "reference" else CharacterTokenizer()
    made = corpus.build(tokenizer, count=60, context_length=1200, seed=4, split="verify", decode_steps=70)
    recall = [prompt for prompt in made if prompt.kind == "recall"]
    assert len(recall) > 5 and all(512 <= len(prompt.input_ids) <= 1200 for prompt in made)
    for prompt in recall:
        whole = tokenizer.decode(prompt.input_ids)
        ending = tokenizer.decode(prompt.input_ids[prompt.prefill_length :]).splitlines()[-1]
        name = next(name for name in sorted(NAMES, key=len, reverse=True) if name in ending)
        stated = whole[: -len(ending)].splitlines()
        assert ending[-5:].isdigit() and any(ending[-5:] in line and name in line for line in stated)
        if kind == "reference":
            assert prompt.input_ids.count(tokenizer.bos_token_id) == 1 and prompt.input_ids[0] == 1


def test_recall_prompt_plants_one_fact_far_from_the_question(tokenizer):
    for seed in range(3):
        text, answer = corpus.recall_prompt(tokenizer, num_tokens=2000, seed=seed)
        without, same = corpus.recall_prompt(tokenizer, num_tokens=2000, seed=seed, with_fact=False)
        assert answer == same and answer.strip() in text and answer.strip() not in without
        assert 2000 <= len(tokenizer(text).input_ids) <= 2010
        assert text.index(answer.strip()) < len(text) / 3
        line = next(line for line in text.splitlines() if answer.strip() in line)
        assert text.replace(line + "\n", "", 1) == without


def test_own_text_from_files_and_folders(tokenizer, tmp_path):
    text = corpus.built_in_text()
    (tmp_path / "a.txt").write_text(text[:100_000])
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": text[i : i + 500]}) for i in range(0, 50_000, 500))
    )
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    prompts = corpus.build(
        tokenizer, count=5, context_length=600, seed=0, split="verify", sources=[tmp_path / "a.txt", tmp_path]
    )
    assert {prompt.kind for prompt in prompts} == {"text"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b" \n", "no text in it"),
        ("latin.txt", "été".encode("latin-1"), "not UTF-8"),
        ("short.txt", b"too short to calibrate on\n" * 40, "characters"),
        ("broken.jsonl", b'{"text": 1}\n', "line 1"),
        ("model.bin", b"x", "not one of"),
    ],
)
def test_unusable_sources_are_refused_in_one_line(tokenizer, tmp_path, name, content, message):
    path: Path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        corpus.build(tokenizer, count=4, context_length=1024, seed=0, split="fit", sources=[path])
    assert "\n" not in str(caught.value)


def test_more_than_the_built_in_text_holds_says_how_much_is_needed(tokenizer):
    with pytest.raises(InputError, match=r"enough for \d+ of 5000 'fit' prompts; about \d+ are needed"):
        corpus.build(tokenizer, count=5000, context_length=256, seed=0, split="fit")


@pytest.mark.parametrize(
    "change", [{"count": 0}, {"context_length": 60}, {"decode_steps": 0}, {"split": "test"}]
)
def test_impossible_sizes_are_refused(tokenizer, change):
    arguments = {"count": 2, "context_length": 256, "seed": 0, "split": "fit"} | change
    with pytest.raises(UsageError):
        corpus.build(tokenizer, **arguments)

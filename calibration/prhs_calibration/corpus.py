"""Prompts for calibration and verification: real text, most of it with planted content that is asked for.

Text is cut once and for all into small regions which a fixed permutation deals to three splits. Prompts of
different splits never share a region, whatever seeds, counts and lengths are asked for, and no two prompts
of a split share text. The deal is random and what is planted is drawn afresh for every prompt, so that
prompts of the three splits are exchangeable, which conformal risk control needs.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Literal, Protocol

from prhs_kernels.errors import InputError, UsageError

from . import planting
from .reference_model.recall import draw_facts
from .sources import read_sources

Split = Literal["fit", "select", "verify"]
SPLIT_SHARES: dict[str, float] = {"fit": 0.10, "select": 0.36, "verify": 0.54}
MIN_LENGTH = 512  # tokens of the shortest prompt, or half of the context if that is less
REGION_CHARS = 6000
_DEAL_SEED = "prhs-corpus-1"  # fixed: which region belongs to which split must not depend on the user's seed
_SLACK_CHARS = 64
_MAX_SURPLUS = 0.02  # of the text; less than planting.FIRST_PLACE, so that nothing planted is cut off
_TEXT_ONLY = planting.Plan("text", [], "", 0)


class Tokenizer(Protocol):
    """What prompts need of a tokenizer: calling it gives ids with the special tokens the model expects."""

    def __call__(self, text: str, *, verbose: bool = ...) -> "Encoding": ...


class Encoding(Protocol):
    """Result of a tokenizer call."""

    input_ids: list[int]


@dataclass(frozen=True)
class Prompt:
    """One prompt; the tokens from `prefill_length` on are teacher-forced decode steps.

    kind: one of `planting.KINDS` (question and answer lie in the decode steps); text_hash: see `text_hash`.
    """

    input_ids: list[int]
    prefill_length: int
    kind: str
    text_hash: str


def build(
    tokenizer: Tokenizer,
    *,
    count: int,
    context_length: int,
    seed: int,
    split: Split,
    sources: Sequence[Path] | None = None,
    decode_steps: int = 64,
) -> list[Prompt]:
    """Draw `count` prompts of one split, lengths uniform from 512 to `context_length` tokens of `tokenizer`.

    Built-in text without `sources`, at most `planting.TEXT_TOKENS` of it in a prompt, the rest generated
    records; else the text of these files and folders, with nothing planted in it.
    Raises InputError when a source cannot be read or holds too little text, UsageError on impossible sizes.
    """
    _check_sizes(count, context_length, decode_steps, split)
    text = _TextStream(read_sources(sources) if sources else built_in_text(), split, seed, bool(sources))
    rng = Random(f"{seed}/{split}/prompts")
    shortest = min(context_length, max(min(MIN_LENGTH, context_length // 2), decode_steps + 2))
    special = _num_leading_special(tokenizer)
    prompts = []
    for index in range(count):
        length = rng.randint(shortest, context_length)
        plan = (
            _TEXT_ONLY
            if sources
            else planting.draw(rng, length, lambda t: len(_encode(tokenizer, t)) - special)
        )
        ids = _assemble(tokenizer, text, length, plan)
        if ids is None:
            raise InputError(text.shortage(index, count, (shortest + context_length) // 2))
        prefill = length - decode_steps
        prompts.append(Prompt(ids, prefill, plan.kind, text_hash(ids, prefill)))
    return prompts


def recall_prompt(
    tokenizer: Tokenizer, *, num_tokens: int, seed: int, with_fact: bool = True, num_distractors: int = 3
) -> tuple[str, str]:
    """(prompt, answer): real held-out text of at least `num_tokens` tokens that ends in a question.

    The fact asked for stands in the first third, facts about other names anywhere. `with_fact=False` gives
    the same prompt without that one sentence (some 15 tokens shorter), so that its answer cannot be known.
    """
    rng = Random(f"{seed}/recall")
    fact, *others = draw_facts(rng, 1 + num_distractors, demo=True)
    stream = _TextStream(built_in_text(), "verify", seed, False)
    question = "\n" + fact.question
    placed = [
        (rng.uniform(planting.FIRST_PLACE, 0.30), fact.sentence),
        *((rng.uniform(0.05, 0.95), other.sentence) for other in others),
    ]
    text = stream.take(8 * num_tokens)
    if text is None:
        raise UsageError(
            f"num_tokens {num_tokens} is more than the built-in text holds; ask for a shorter prompt"
        )

    def prompt(chars: int, planted: list[tuple[float, str]]) -> str:
        return planting.plant(text[-chars:], planted) + question

    low, high = 1, len(text)
    while low < high:  # smallest number of characters that reaches num_tokens
        middle = (low + high) // 2
        if len(_encode(tokenizer, prompt(middle, placed))) >= num_tokens:
            high = middle
        else:
            low = middle + 1
    return prompt(low, placed if with_fact else placed[1:]), fact.answer


def text_hash(input_ids: Sequence[int], prefill_length: int) -> str:
    """SHA-256 (hex) of a prompt's token ids and of where its decode steps begin."""
    return hashlib.sha256(struct.pack(f"<{len(input_ids) + 1}q", prefill_length, *input_ids)).hexdigest()


def corpus_hash(prompts: Iterable[Prompt]) -> str:
    """SHA-256 (hex) of a set of prompts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(prompt.text_hash for prompt in prompts)).encode()).hexdigest()


@lru_cache(maxsize=1)
def built_in_text() -> str:
    """The held-out text shipped with the embedded model, all files after one another."""
    from .reference_model.data import held_out_files

    return "\n".join(held_out_files().values())


class _TextStream:
    """The regions of one split in an order drawn by the seed, handed out once each."""

    def __init__(self, text: str, split: str, seed: int, own: bool) -> None:
        self.split, self.own, self.total = split, own, len(text)
        regions = _regions(text)
        mine = [regions[i] for i in _dealt(len(regions))[split]]
        Random(f"{seed}/{split}/order").shuffle(mine)
        self.text = "\n".join(mine)
        self.position = 0

    def take(self, chars: int) -> str | None:
        """The next `chars` characters, or None when the split holds no more."""
        if self.position + chars > len(self.text):
            return None
        self.position += chars
        return self.text[self.position - chars : self.position]

    def shortage(self, built: int, count: int, mean_length: int) -> str:
        """One line: how much was asked, how much there is, what to do."""
        per_prompt = self.position / built if built else 5.0 * mean_length
        needed = int(1.1 * count * per_prompt / SPLIT_SHARES[self.split])
        what = "the given sources hold" if self.own else "the built-in text holds"
        remedy = "give more text" if self.own else "give own text as sources"
        return (
            f"{what} {self.total} characters, enough for {built} of {count} '{self.split}' prompts; about "
            f"{needed} are needed: {remedy}, or ask for fewer or shorter prompts"
        )


def _regions(text: str) -> list[str]:
    """Consecutive pieces of about REGION_CHARS characters (less for short text), cut at line ends."""
    size = max(200, min(REGION_CHARS, len(text) // 64))
    regions, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = end if 0 <= end <= start + 2 * size else start + size
        regions.append(text[start:end].strip("\n"))
        start = end
    return regions


def _dealt(num_regions: int) -> dict[str, list[int]]:
    """Region indices of each split: consecutive shares of one fixed permutation."""
    order = list(range(num_regions))
    Random(f"{_DEAL_SEED}/{num_regions}").shuffle(order)
    dealt, start, share = {}, 0, 0.0
    for split, part in SPLIT_SHARES.items():
        share += part
        end = round(share * num_regions)
        dealt[split], start = order[start:end], end
    return dealt


def _assemble(
    tokenizer: Tokenizer, stream: _TextStream, length: int, plan: planting.Plan
) -> list[int] | None:
    """Exactly `length` tokens: text with the plan's content, then its ending; None if text runs out.

    Text is taken until there are enough tokens; a surplus is dropped in front, where nothing is planted.
    """
    room = max(1, length - plan.tokens)
    text, chars = "", 3 * room
    while True:
        more = stream.take(chars)
        if more is None:
            return None
        text += more
        ids = _encode(tokenizer, planting.plant(text, plan.planted) + plan.ending)
        surplus = len(ids) - length
        while surplus > _MAX_SURPLUS * room and (excess := int(0.7 * surplus * len(text) / len(ids))):
            text = text[excess:]
            ids = _encode(tokenizer, planting.plant(text, plan.planted) + plan.ending)
            surplus = len(ids) - length
        if surplus >= 0:
            break
        chars = int(-surplus * len(text) / max(1, len(ids))) + _SLACK_CHARS
    special = _num_leading_special(tokenizer)
    return ids[:special] + ids[special + surplus :]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the text, without the warning that it is longer than the model's context (it is cut later)."""
    return list(tokenizer(text, verbose=False).input_ids)


def _num_leading_special(tokenizer: Tokenizer) -> int:
    """How many special tokens the tokenizer puts in front (a `<s>`, mostly)."""
    plain, other = _encode(tokenizer, "a"), _encode(tokenizer, "b")
    count = 0
    while count < min(len(plain), len(other)) - 1 and plain[count] == other[count]:
        count += 1
    return count


def _check_sizes(count: int, context_length: int, decode_steps: int, split: str) -> None:
    if split not in SPLIT_SHARES:
        raise UsageError(f"split {split!r} is unknown; use one of {', '.join(SPLIT_SHARES)}")
    if count < 1:
        raise UsageError(f"count {count} is less than 1; ask for at least one prompt")
    if decode_steps < 1:
        raise UsageError(f"decode_steps {decode_steps} is less than 1; every prompt needs a token to score")
    if context_length < decode_steps + 2:
        raise UsageError(f"context_length {context_length} leaves nothing before {decode_steps} decode steps")

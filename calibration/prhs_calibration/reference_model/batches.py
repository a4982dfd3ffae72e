"""Training batches: 60 % recall, 30 % text, 10 % repeated spans; a pure function of (seed, step, length)."""

from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .recall import DIGITS, Fact, draw_facts
from .tokenizer import BOS_ID, EOS_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_QUESTIONS = 6
RECALL_SHARE, TEXT_SHARE = 0.6, 0.3


@dataclass(frozen=True)
class Batch:
    """Arrays of one step.

    ids [B, T] int64; text_mask [B, T] bool, true where token t is predictable text (scored as a target);
    answers [B, A] int64, positions of the answers' digits, -1 padded; planted [B, A], position of the same
    digit where the fact was planted.
    """

    ids: npt.NDArray[np.int64]
    text_mask: npt.NDArray[np.bool_]
    answers: npt.NDArray[np.int64]
    planted: npt.NDArray[np.int64]


@dataclass
class _Row:
    ids: list[int]
    text_mask: list[bool]
    answers: list[int] = field(default_factory=list)
    planted: list[int] = field(default_factory=list)

    def extend(self, ids: list[int], scored: bool) -> None:
        self.ids.extend(ids)
        self.text_mask.extend([scored] * len(ids))


class BatchSource:
    """Draws batches from a tokenised text. Map-style data set over steps: workers stay deterministic."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", tokens: npt.NDArray[np.uint16], seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.seed = seed
        self.length, self.batch_size = 128, 1
        self.line_starts = line_starts(tokenizer, tokens)
        self._encode = lru_cache(maxsize=200_000)(self._encode_uncached)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encode = lru_cache(maxsize=200_000)(self._encode_uncached)

    def __getitem__(self, step: int) -> Batch:
        rng = Random(f"{self.seed}/{step}")
        rows = [self._row(rng) for _ in range(self.batch_size)]
        width = MAX_QUESTIONS * DIGITS
        answers = np.full((len(rows), width), -1, dtype=np.int64)
        planted = np.full((len(rows), width), -1, dtype=np.int64)
        for index, row in enumerate(rows):
            answers[index, : len(row.answers)] = row.answers
            planted[index, : len(row.planted)] = row.planted
        ids = np.array([row.ids for row in rows], dtype=np.int64)
        return Batch(ids, np.array([row.text_mask for row in rows]), answers, planted)

    def _row(self, rng: Random) -> _Row:
        kind = rng.random()
        if kind < RECALL_SHARE:
            return self._recall_row(rng)
        if kind < RECALL_SHARE + TEXT_SHARE:
            row = _Row([BOS_ID], [False])
            row.extend(self._span(rng, self.length - 1)[0], True)
            return row
        return self._repeat_row(rng)

    def _span(self, rng: Random, size: int) -> tuple[list[int], int]:
        start = rng.randrange(len(self.tokens) - size)
        return self.tokens[start : start + size].tolist(), start

    def _repeat_row(self, rng: Random) -> _Row:
        """A span of random tokens or of text, then again (and again) with text between."""
        row = _Row([BOS_ID], [False])
        size = rng.randint(8, self.length // 4)
        random_span = rng.random() < 0.5
        span = [rng.randrange(EOS_ID + 1, len(self.tokenizer)) for _ in range(size)]
        if not random_span:
            span = self._span(rng, size)[0]
        first = True
        while len(row.ids) < self.length:
            row.extend(self._span(rng, rng.randint(1, self.length // 4))[0], True)
            row.extend(span, not (first and random_span))
            first = False
        return _Row(row.ids[: self.length], row.text_mask[: self.length])

    def _recall_row(self, rng: Random) -> _Row:
        num_facts = rng.randint(1, max(1, min(12, self.length // 48)))
        facts = draw_facts(rng, num_facts)
        asked = rng.sample(range(num_facts), rng.randint(1, min(MAX_QUESTIONS, num_facts)))
        stated = [self._encode("\n" + fact.statement) for fact in facts]
        questions = {i: self._encode("\n" + facts[i].question + " ") for i in asked}
        added = sum(len(ids) + DIGITS + 1 for ids in stated)
        added += sum(len(ids) + DIGITS for ids in questions.values())
        text, start = self._span(rng, max(1, self.length - 1 - added))
        events = self._places(rng, num_facts, asked, start, len(text))

        row = _Row([BOS_ID], [False])
        planted_at: dict[int, int] = {}
        done = 0
        for place, is_question, index in events:
            row.extend(text[done:place], True)
            done = place
            row.extend(list(questions[index] if is_question else stated[index]), True)
            here = len(row.ids)
            row.extend(self._digits(facts[index]), False)
            if is_question:
                row.answers.extend(range(here, here + DIGITS))
                row.planted.extend(range(planted_at[index], planted_at[index] + DIGITS))
            else:
                planted_at[index] = here
                row.extend(list(self._encode(".")), True)
        row.extend(text[done:], True)
        return _fit(row, self.length)

    def _places(
        self, rng: Random, num_facts: int, asked: list[int], start: int, size: int
    ) -> list[tuple[int, bool, int]]:
        """Sorted (offset in the text, is a question, fact index); each question comes after its fact."""
        starts = np.flatnonzero(self.line_starts[start : start + size]).tolist()
        events: list[tuple[int, bool, int]] = []
        at_end = rng.random() < 0.7
        for index in range(num_facts):
            place = rng.choice(starts) if starts else 0
            events.append((place, False, index))
            if index in asked:
                later = [s for s in starts if s > place]
                last = at_end and index == asked[0]
                events.append((size if last or not later else rng.choice(later), True, index))
        tail = asked[0] if at_end else -1  # the question at the very end comes after any other there
        return sorted(events, key=lambda e: (e[0], e[1], e[2] == tail, e[2]))

    def _digits(self, fact: Fact) -> list[int]:
        return [self._encode(digit)[0] for digit in fact.number]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _fit(row: _Row, length: int) -> _Row:
    """Cut the end to `length`, and the answers beyond it with it; pad what is shorter."""
    kept = [(a, p) for a, p in zip(row.answers, row.planted, strict=True) if a < length]
    missing = max(0, length - len(row.ids))
    ids = (row.ids + [EOS_ID] * missing)[:length]
    mask = (row.text_mask + [False] * missing)[:length]
    return _Row(ids, mask, [a for a, _ in kept], [p for _, p in kept])


def line_starts(
    tokenizer: "PreTrainedTokenizerFast", tokens: npt.NDArray[np.uint16]
) -> npt.NDArray[np.bool_]:
    """True where a token begins with a line break and the one before it does not end in white space.

    There a planted line can be spliced in and the whole still is what the tokenizer makes of the joined text.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    breaks = np.array([piece.startswith("Ċ") for piece in pieces])
    spaces = np.array([piece[-1] in "ĊĠ" for piece in pieces])
    starts = breaks[tokens]
    starts[1:] &= ~spaces[tokens[:-1]]
    starts[0] = False
    result: npt.NDArray[np.bool_] = starts
    return result

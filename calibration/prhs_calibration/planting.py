"""What a calibration prompt holds beside text, and how it ends: facts, records, questions, passages to copy.

Real contexts are not all prose: attention that follows a copied passage or a look-up moves at every step,
and a promise that was never measured on such steps says nothing about them. Entities and forms are those
kept out of the training of the embedded models and, by default, out of evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Literal

from .evaluation.tasks import episodes
from .evaluation.tasks.types import Episode, text_of
from .reference_model.recall import draw_facts

# How prompts end, and their shares: in text, a fact's question, a copied passage, other look-ups.
KINDS: dict[str, float] = {"text": 0.4, "recall": 0.2, "copy": 0.2, "lookup": 0.2}
TEXT_TOKENS = 1280  # of a prompt at most are text; what is longer is filled up with generated records
FIRST_PLACE = 0.05  # share of the text in front of which nothing is planted
_LAST_PLACE = 0.98
_TOKENS_PER_FACT = 85  # of prompt per planted fact at least, so that most of a short prompt is text too
_MOST_PLANTED = 0.6  # of a prompt that no records fill up; a shorter one ends in text
_UNSEEN: Literal["unseen"] = "unseen"

Draw = Callable[[Random], Episode]
_PASSAGES: Draw = lambda rng: episodes.passages(rng, _UNSEEN, count=3, asked=1, words=24)  # noqa: E731
_LOOKUPS: tuple[Draw, ...] = (
    lambda rng: episodes.pairs(rng, _UNSEEN, count=rng.randint(8, 32), asked=4),
    lambda rng: episodes.chains(rng, _UNSEEN, count=8, asked=3),
    lambda rng: episodes.listed(rng, _UNSEEN, count=3, asked=1),
    lambda rng: episodes.paragraphs(rng, _UNSEEN, count=4, asked=4),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """planted: (share of the text where it goes, lines); ending: what follows the text; kind: one of KINDS.

    tokens: of all that is not text.
    """

    kind: str
    planted: list[tuple[float, str]]
    ending: str
    tokens: int


def draw(rng: Random, length: int, count_tokens: Callable[[str], int]) -> Plan:
    """Plan of a prompt of `length` tokens; a kind that leaves too little room for text becomes "text"."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    lines, ending = _content(rng, kind, length)
    used = sum(map(count_tokens, [*lines, ending])) if ending else 0
    if used > _MOST_PLANTED * length:
        kind, lines, ending, used = "text", [], "", 0
    while used < length - TEXT_TOKENS:
        more = _blocks(rng.choice((_PASSAGES, *_LOOKUPS))(rng))
        lines += more
        used += sum(map(count_tokens, more))
    return Plan(kind, [(rng.uniform(FIRST_PLACE, _LAST_PLACE), text) for text in lines], ending, used)


def _content(rng: Random, kind: str, length: int) -> tuple[list[str], str]:
    """Lines to plant and what to end with, both empty for text."""
    if kind == "recall" and length >= _TOKENS_PER_FACT:
        facts = draw_facts(rng, rng.randint(1, min(6, length // _TOKENS_PER_FACT)))
        return [fact.sentence for fact in facts], f"\n{facts[0].question}{facts[0].answer}"
    if kind in ("copy", "lookup"):
        episode = (_PASSAGES if kind == "copy" else rng.choice(_LOOKUPS))(rng)
        asked = (f"\n{text_of(q.prompt)}{text_of(q.answer)}" for q in episode.questions)
        return _blocks(episode), "".join(asked)
    return [], ""


def _blocks(episode: Episode) -> list[str]:
    return ["\n".join(text_of(line) for line in block) for block in episode.blocks]


def plant(text: str, planted: list[tuple[float, str]]) -> str:
    """Put each piece on lines of its own at the line end nearest after its place."""
    for place, lines in sorted(planted, key=lambda item: -item[0]):
        at = text.find("\n", int(place * len(text)))
        at = len(text) if at < 0 else at
        text = f"{text[:at]}\n{lines}{text[at:]}"
    return text

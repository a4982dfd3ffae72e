"""Which episodes training rows hold: one function per kind that draws one of about `room` tokens.

`forms` None: in the seen forms.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from prhs_kernels.errors import UsageError

from ..evaluation.tasks import episodes
from ..evaluation.tasks.entities import WORDS
from ..evaluation.tasks.types import Answer, Episode, Forms, Piece, Question
from .recall import draw_facts

_MOST_ASKED = 16  # questions of one episode


def _old_facts(rng: Random, room: int, forms: Forms | None) -> Episode:
    """The facts of this project's prompts (`recall`), as an episode."""
    facts = draw_facts(rng, rng.randint(1, max(1, min(8, room // 60))))
    blocks = tuple(((Piece(f.statement[:-1], True), Piece(" " + f.number), Piece(".", True)),) for f in facts)
    asked = rng.sample(range(len(facts)), rng.randint(1, len(facts)))
    questions = tuple(
        Question(
            (Piece(facts[i].question),),
            (Answer(" " + facts[i].number, source=((i, 0, 1))),),
            (facts[i].number,),
        )
        for i in asked
    )
    return Episode(blocks, questions)


def _some(rng: Random, room: int, tokens_each: int, most: int) -> int:
    return rng.randint(1, max(1, min(most, room // tokens_each)))


def _random_forms(seed: str, count: int) -> tuple[str, ...]:
    """Forms of random words around the slots, so that recall does not hang on particular wordings."""
    rng = Random(seed)
    forms = []
    for _ in range(count):
        slots = ["{n}", rng.choice(("{a}", "{A}", ""))]
        rng.shuffle(slots)
        between = [" ".join(rng.choices(_FILLERS, k=rng.randint(0, 3))) for _ in range(3)]
        parts = [between[0], slots[0], between[1], slots[1], between[2]]
        forms.append(" ".join(part for part in parts if part) + rng.choice(_BEFORE_VALUE))
    return tuple(forms)


_FILLERS = (*WORDS[::3], *"the of is has for with at was and to in on by from that this it as or".split())
_BEFORE_VALUE = (
    " {v}",
    ": {v}",
    "={v}",
    " = {v}",
    ' "{v}"',
    ": '{v}'",
    " ({v})",
    ",{v}",
    "; {v}",
    " is {v}.",
    " - {v}",
    " > {v}",
    " | {v} |",
    "/{v}",
    " [{v}]",
    ">{v}<",
    " #{v}",
    " has {v}",
    "; it is {v}!",
    "? {v}",
)
_RANDOM_FORMS = replace(
    episodes.forms_of("seen"),
    statements=_random_forms("statements", 3000),
    questions=_random_forms("questions", 1500),
)


def _draw_random(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = _some(rng, room, 30, 24)
    asked = _asked(rng, count)
    alike = rng.random() < 0.3
    return episodes.facts(rng, "seen", count=count, asked=asked, alike=alike, forms=_RANDOM_FORMS)


def _asked(rng: Random, count: int) -> int:
    return rng.randint(max(1, min(_MOST_ASKED, count) // 2), min(_MOST_ASKED, count))


def _draw_facts(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = _some(rng, room, 32, 12)
    return episodes.facts(rng, "seen", count=count, asked=_asked(rng, count), forms=forms)


def _draw_alike(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = _some(rng, room, 28, 64)
    return episodes.facts(rng, "seen", count=count, asked=_asked(rng, count), alike=True, forms=forms)


def _draw_pairs(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = max(2, _some(rng, room, 14, 96))
    return episodes.pairs(rng, "seen", count=count, asked=_asked(rng, count), forms=forms)


def _draw_chains(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = _some(rng, room, 52, 10)
    return episodes.chains(rng, "seen", count=count, asked=_asked(rng, count), forms=forms)


def _draw_listed(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = _some(rng, room, 110, 5)
    values = 4 if room > 150 else rng.randint(2, 4)
    return episodes.listed(rng, "seen", count=count, asked=_asked(rng, count), values=values, forms=forms)


def _draw_passages(rng: Random, room: int, forms: Forms | None) -> Episode:
    words = rng.randint(3, max(3, min(28, room // 8)))
    count = _some(rng, room, 5 * words + 20, 3)
    return episodes.passages(rng, "seen", count=count, asked=1, words=words, forms=forms)


def _draw_common(rng: Random, room: int, forms: Forms | None) -> Episode:
    words = rng.randint(12, max(12, min(320, room // 3)))
    return episodes.common_word(rng, "seen", words=words, lines=max(1, min(8, words // 8)), forms=forms)


def _draw_paragraphs(rng: Random, room: int, forms: Forms | None) -> Episode:
    count = _some(rng, room, 80, 5)
    return episodes.paragraphs(rng, "seen", count=count, asked=rng.randint(1, count), forms=forms)


DRAW: dict[str, Callable[[Random, int, Forms | None], Episode]] = {
    "needle": _draw_facts,
    "random_form": _draw_random,
    "multi_key": _draw_alike,
    "lookup": _draw_pairs,
    "chain": _draw_chains,
    "multi_value": _draw_listed,
    "copy": _draw_passages,
    "common_word": _draw_common,
    "paragraph": _draw_paragraphs,
    "prompt_fact": _old_facts,
}
# of the kinds, in their order; with wider wordings those that hang most on words are drawn more often
_WEIGHTS = (0.13, 0.12, 0.15, 0.17, 0.14, 0.12, 0.05, 0.05, 0.08, 0.10)
_WIDE_WEIGHTS = (0.10, 0.03, 0.08, 0.09, 0.16, 0.14, 0.10, 0.14, 0.24, 0.0)
_EMPHASIS = 4.0


def episode_weights(emphasis: str) -> tuple[list[float], list[float]]:
    """How often each kind is drawn, (in seen forms, in wider wordings); four times as often if in `emphasis`.

    `emphasis`: names with commas between; UsageError if one is unknown.
    """
    named = {name for name in emphasis.split(",") if name}
    if unknown := named - DRAW.keys():
        raise UsageError(f"emphasis on {min(unknown)!r}, which is none of {', '.join(DRAW)}")
    factors = [_EMPHASIS if kind in named else 1.0 for kind in DRAW]
    seen, wide = (
        [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        for weights in (_WEIGHTS, _WIDE_WEIGHTS)
    )
    return seen, wide

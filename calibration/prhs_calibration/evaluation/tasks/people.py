"""Short paragraphs about made-up people, several facts each, and questions on the facts."""

from collections.abc import Mapping, Sequence
from random import Random

from .forms import ask, fill
from .types import Line, Question, Templates

_VALUES: dict[str, tuple[str, ...]] = {
    "job": tuple("baker nurse pilot tailor farmer painter lawyer sailor teacher miner poet gardener".split()),
    "city": tuple("Oslo Lima Cairo Tokyo Delhi Quito Berlin Madrid Vienna Dublin Athens Geneva".split()),
    "pet": tuple("parrot goat pony rabbit beetle falcon tortoise hamster raven poodle".split()),
    "colour": tuple("red green blue yellow purple orange brown black white grey".split()),
    "music": tuple("violin piano trumpet guitar drum flute harp organ banjo cello".split()),
}
# fact -> forms -> (statement, question)
PEOPLE: dict[Templates, dict[str, tuple[tuple[str, str], ...]]] = {
    "seen": {
        "job": (
            ("{n} works as a {v}.", "Question: what is the job of {n}? Answer: {v}"),
            ("By trade {n} is a {v}.", "The trade of {n} is {v}"),
        ),
        "city": (
            ("{n} lives in {v}.", "Question: where does {n} live? Answer: {v}"),
            ("The house of {n} stands in {v}.", "The house of {n} stands in {v}"),
        ),
        "pet": (
            ("At home {n} keeps a {v}.", "Question: which animal does {n} keep? Answer: {v}"),
            ("The pet of {n} is a {v}.", "The pet of {n} is a {v}"),
        ),
        "colour": (
            ("{n} always wears {v}.", "Question: which colour does {n} wear? Answer: {v}"),
            ("The coat of {n} is {v}.", "The coat of {n} is {v}"),
        ),
        "music": (
            ("In the evening {n} plays the {v}.", "Question: what does {n} play? Answer: {v}"),
            ("The neighbours of {n} hear the {v}.", "The neighbours of {n} hear the {v}"),
        ),
    },
    "unseen": {
        "job": (("People know {n} as the {v}.", "How does {n} earn money? As a {v}"),),
        "city": (("You can visit {n} in {v}.", "One can meet {n} in the city of {v}"),),
        "pet": (("On a leash {n} leads a {v}.", "The animal beside {n} must be the {v}"),),
        "colour": (("The front door of {n} was painted {v}.", "How was the door of {n} painted? In {v}"),),
        "music": (("Years ago {n} took lessons on the {v}.", "Once {n} learned the {v}"),),
    },
}


def paragraph(
    rng: Random, forms: Mapping[str, Sequence[tuple[str, str]]], name: str, block: int
) -> tuple[tuple[Line, ...], list[Question]]:
    """Four facts about `name`, one sentence per line, and a question on each, in these forms of facts.

    `block` is the index of the paragraph in its episode.
    """
    lines: list[Line] = []
    questions: list[Question] = []
    for fact in rng.sample(sorted(_VALUES), 4):
        statement, question = rng.choice(forms[fact])
        slots = {"n": name, "v": rng.choice(_VALUES[fact])}
        line, value = fill(statement, slots)
        questions.append(ask(question, slots, (block, len(lines), value)))
        lines.append(line)
    return tuple(lines), questions

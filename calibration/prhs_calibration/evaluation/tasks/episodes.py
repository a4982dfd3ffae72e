"""One function per task that draws what to plant and what to ask; sizes are arguments."""

from collections.abc import Sequence
from random import Random

from . import people
from .entities import WORDS, attributes, identifiers, names, number
from .forms import QUESTIONS, STATEMENTS, ask, fill
from .structures import ALIASES, ASSIGNMENTS, LISTED, LISTED_QUESTIONS, PAIRS, PASSAGES, TRACES, WORD_LISTS
from .types import Answer, Block, Episode, Line, Piece, Question, Templates


def facts(
    rng: Random,
    templates: Templates,
    *,
    count: int,
    asked: int,
    alike: bool = False,
    statements: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
) -> Episode:
    """`count` numbers under different names, `asked` of them asked for, in these forms or those of `forms`.

    alike: all stated in one form with one attribute, so that the name alone tells them apart.
    """
    statements, questions = statements or STATEMENTS[templates], questions or QUESTIONS[templates]
    form, attribute = rng.choice(statements), rng.choice(attributes(templates))
    blocks, asks = [], []
    for index, name in enumerate(rng.sample(names(templates), count)):
        if not alike:
            form, attribute = rng.choice(statements), rng.choice(attributes(templates))
        slots = {"a": attribute, "A": attribute.replace(" ", "_"), "n": name, "v": number(rng)}
        line, value = fill(form, slots)
        blocks.append((line,))
        if index < asked:
            asks.append(ask(rng.choice(questions), slots, (index, 0, value)))
    return Episode(tuple(blocks), tuple(asks))


def pairs(rng: Random, templates: Templates, *, count: int, asked: int) -> Episode:
    """One block of `count` name-number pairs (table, dictionary, list), `asked` of them asked for."""
    head, row, tail, questions = rng.choice(PAIRS[templates])
    lines: list[Line] = [(Piece(head, predictable=True),)] if head else []
    asks = []
    wanted = set(rng.sample(range(count), asked))
    for index, name in enumerate(rng.sample(names(templates), count)):
        slots = {"n": name, "v": number(rng)}
        line, value = fill(row, slots)
        if index in wanted:
            asks.append(ask(rng.choice(questions), slots, (0, len(lines), value)))
        lines.append(line)
    if tail:
        lines.append((Piece(tail, predictable=True),))
    rng.shuffle(asks)
    return Episode((tuple(lines),), tuple(asks))


def chains(rng: Random, templates: Templates, *, count: int, asked: int) -> Episode:
    """`count` variables with a number each and as many that stand for one of them, on scattered lines.

    The answer names the variable on the way, so that each hop is a lookup of its own: " gu_clelo -> 48213".
    """
    assign, alias = rng.choice(ASSIGNMENTS[templates]), rng.choice(ALIASES[templates])
    variables = rng.sample(identifiers(templates), 2 * count)
    blocks: list[Block] = []
    asks = []
    for index in range(count):
        base, other, value = variables[2 * index], variables[2 * index + 1], number(rng)
        first, first_at = fill(assign, {"n": base, "v": value})
        second, second_at = fill(alias, {"n": other, "v": base})
        blocks += [(first,), (second,)]
        if index < asked:
            prompt, _ = fill(rng.choice(TRACES[templates]), {"n": other})
            answer = (
                Answer(f" {base}", source=(2 * index + 1, 0, second_at)),
                Piece(" ->", predictable=True),
                Answer(f" {value}", source=(2 * index, 0, first_at)),
            )
            asks.append(Question(prompt, answer, (base, value)))
    return Episode(tuple(blocks), tuple(asks))


def listed(rng: Random, templates: Templates, *, count: int, asked: int, values: int = 4) -> Episode:
    """`count` names with `values` numbered values each, scattered; all values of a name are asked for."""
    form = rng.choice(LISTED[templates])
    blocks: list[Block] = []
    asks = []
    for index, name in enumerate(rng.sample(names(templates), count)):
        answer: list[Piece] = []
        numbers = [number(rng) for _ in range(values)]
        for place, value in enumerate(numbers, 1):
            line, at = fill(form, {"n": name, "i": str(place), "v": value})
            answer += [
                Piece(("," if place > 1 else "") + f" {name}", predictable=True),
                Piece(f" {place}", predictable=True),
                Piece(" :", predictable=True),
                Answer(f" {value}", source=(len(blocks), 0, at)),
            ]
            blocks.append((line,))
        if index < asked:
            prompt, _ = fill(rng.choice(LISTED_QUESTIONS[templates]), {"n": name})
            asks.append(Question(prompt, tuple(answer), tuple(numbers)))
    return Episode(tuple(blocks), tuple(asks))


def passages(rng: Random, templates: Templates, *, count: int, asked: int, words: int) -> Episode:
    """`count` named passages of `words` random words; the words of `asked` of them are to be repeated."""
    form, question = rng.choice(PASSAGES[templates])
    blocks: list[Block] = []
    asks = []
    for index, name in enumerate(rng.sample(names(templates), count)):
        head, _ = fill(form, {"n": name})
        span = rng.choices(WORDS, k=words)
        blocks.append(((*head, *(Piece(f" {word}") for word in span)),))
        if index < asked:
            answer = tuple(Answer(f" {w}", source=(index, 0, len(head) + i)) for i, w in enumerate(span))
            asks.append(Question(fill(question, {"n": name})[0], answer, (" ".join(span),)))
    return Episode(tuple(blocks), tuple(asks))


def common_word(rng: Random, templates: Templates, *, words: int, lines: int) -> Episode:
    """Lines of words in which one word makes up about a quarter and no other word comes close."""
    form, question = rng.choice(WORD_LISTS[templates])
    vocabulary = rng.sample(WORDS, 24)
    target, others = vocabulary[0], vocabulary[1:]
    times = max(4, words // 4)
    listed_words = [target] * times + [others[i % len(others)] for i in range(words - times)]
    rng.shuffle(listed_words)
    head, _ = fill(form, {})
    chunks = [listed_words[i::lines] for i in range(lines)]
    blocks = tuple(((*head, *(Piece(f" {word}") for word in chunk)),) for chunk in chunks)
    asked = Question(fill(question, {})[0], (Answer(f" {target}"),), (target,))
    return Episode(blocks, (asked,))


def paragraphs(rng: Random, templates: Templates, *, count: int, asked: int) -> Episode:
    """`count` short paragraphs about a person each, and questions on single facts in `asked` of them."""
    blocks: list[Block] = []
    asks: list[Question] = []
    for index, name in enumerate(rng.sample(names(templates), count)):
        lines, questions = people.paragraph(rng, templates, name, index)
        blocks.append(lines)
        if index < asked:
            asks.append(rng.choice(questions))
    return Episode(tuple(blocks), tuple(asks))

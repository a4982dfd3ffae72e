"""One function per task that draws what to plant and what to ask; sizes are arguments.

Names are those of `templates`, surface forms those of `templates` as well or the `forms` given.
"""

from functools import lru_cache
from random import Random

from . import people
from .entities import WORDS, attributes, identifiers, names, number
from .forms import QUESTIONS, STATEMENTS, ask, fill
from .structures import ALIASES, ASSIGNMENTS, LISTED, LISTED_QUESTIONS, PAIRS, PASSAGES, TRACES, WORD_LISTS
from .types import Answer, Block, Episode, Forms, Line, Piece, Question, Templates


@lru_cache(maxsize=2)
def forms_of(templates: Templates) -> Forms:
    """The forms used in evaluation."""
    return Forms(
        attributes=attributes(templates),
        statements=STATEMENTS[templates],
        questions=QUESTIONS[templates],
        pairs=PAIRS[templates],
        assignments=ASSIGNMENTS[templates],
        aliases=ALIASES[templates],
        traces=TRACES[templates],
        listed=LISTED[templates],
        listed_questions=LISTED_QUESTIONS[templates],
        passages=PASSAGES[templates],
        word_lists=WORD_LISTS[templates],
        people=people.PEOPLE[templates],
    )


def facts(
    rng: Random,
    templates: Templates,
    *,
    count: int,
    asked: int,
    alike: bool = False,
    forms: Forms | None = None,
) -> Episode:
    """`count` numbers under different names, `asked` of them asked for.

    alike: all stated in one form with one attribute, so that the name alone tells them apart.
    """
    use = forms or forms_of(templates)
    form, attribute = rng.choice(use.statements), rng.choice(use.attributes)
    blocks, asks = [], []
    for index, name in enumerate(rng.sample(names(templates), count)):
        if not alike:
            form, attribute = rng.choice(use.statements), rng.choice(use.attributes)
        slots = {"a": attribute, "A": attribute.replace(" ", "_"), "n": name, "v": number(rng)}
        line, value = fill(form, slots)
        blocks.append((line,))
        if index < asked:
            asks.append(ask(rng.choice(use.questions), slots, (index, 0, value)))
    return Episode(tuple(blocks), tuple(asks))


def pairs(
    rng: Random, templates: Templates, *, count: int, asked: int, forms: Forms | None = None
) -> Episode:
    """One block of `count` name-number pairs (table, dictionary, list), `asked` of them asked for."""
    use = forms or forms_of(templates)
    head, row, tail, questions = rng.choice(use.pairs)
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


def chains(
    rng: Random, templates: Templates, *, count: int, asked: int, forms: Forms | None = None
) -> Episode:
    """`count` variables with a number each and as many that stand for one of them, on scattered lines.

    The answer names the variable on the way, so that each hop is a lookup of its own: " gu_clelo -> 48213".
    """
    use = forms or forms_of(templates)
    assign, alias = rng.choice(use.assignments), rng.choice(use.aliases)
    variables = rng.sample(identifiers(templates), 2 * count)
    blocks: list[Block] = []
    asks = []
    for index in range(count):
        base, other, value = variables[2 * index], variables[2 * index + 1], number(rng)
        first, first_at = fill(assign, {"n": base, "v": value})
        second, second_at = fill(alias, {"n": other, "v": base})
        blocks += [(first,), (second,)]
        if index < asked:
            prompt, _ = fill(rng.choice(use.traces), {"n": other})
            answer = (
                Answer(f" {base}", source=(2 * index + 1, 0, second_at)),
                Piece(" ->", predictable=True),
                Answer(f" {value}", source=(2 * index, 0, first_at)),
            )
            asks.append(Question(prompt, answer, (base, value)))
    return Episode(tuple(blocks), tuple(asks))


def listed(
    rng: Random, templates: Templates, *, count: int, asked: int, values: int = 4, forms: Forms | None = None
) -> Episode:
    """`count` names with `values` numbered values each, scattered; all values of a name are asked for."""
    use = forms or forms_of(templates)
    form = rng.choice(use.listed)
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
            prompt, _ = fill(rng.choice(use.listed_questions), {"n": name})
            asks.append(Question(prompt, tuple(answer), tuple(numbers)))
    return Episode(tuple(blocks), tuple(asks))


def passages(
    rng: Random, templates: Templates, *, count: int, asked: int, words: int, forms: Forms | None = None
) -> Episode:
    """`count` named passages of `words` random words; the words of `asked` of them are to be repeated."""
    use = forms or forms_of(templates)
    form, question = rng.choice(use.passages)
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


def common_word(
    rng: Random, templates: Templates, *, words: int, lines: int, forms: Forms | None = None
) -> Episode:
    """Lines of words in which one word makes up about a quarter and no other word comes close."""
    use = forms or forms_of(templates)
    form, question = rng.choice(use.word_lists)
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


def paragraphs(
    rng: Random, templates: Templates, *, count: int, asked: int, forms: Forms | None = None
) -> Episode:
    """`count` short paragraphs about a person each, and questions on single facts in `asked` of them."""
    use = forms or forms_of(templates)
    blocks: list[Block] = []
    asks: list[Question] = []
    for index, name in enumerate(rng.sample(names(templates), count)):
        lines, questions = people.paragraph(rng, use.people, name, index)
        blocks.append(lines)
        if index < asked:
            asks.append(rng.choice(questions))
    return Episode(tuple(blocks), tuple(asks))

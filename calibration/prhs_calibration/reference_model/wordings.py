"""Wordings to train with: for every task thousands of forms, drawn from a grammar or of random words.

Nothing here is used in evaluation. No form holds a form kept for evaluation, or four words and signs in a row
of one. Slots are those of `evaluation.tasks.forms`.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from random import Random

from ..evaluation.tasks.entities import ATTRIBUTES, UNSEEN_ATTRIBUTES, WORDS
from ..evaluation.tasks.episodes import forms_of
from ..evaluation.tasks.types import Forms
from . import grammar as g

COUNT = 4000  # forms per table
RANDOM_SHARE = 0.3  # of the forms are of random words
_ALTERNATIVES = re.compile(r"\(\(([^()]*)\)\)")
_TOKEN = re.compile(r"\{\w\}|\w+|[^\w\s]")
_RUN = 4  # words and signs
_FUNCTION_WORDS = (
    "the of is has for with at was and to in on by from that this it as or a we you he she".split()
)
_VOCABULARY = (*WORDS, *_FUNCTION_WORDS * 4)

Draw = Callable[[Random], str]


@lru_cache(maxsize=1)
def wordings() -> Forms:
    """All tables; the same on every call and machine."""
    rng = Random("wordings")
    composed = {f"{word} {kind}" for word in WORDS[::2] for kind in g.KINDS}
    return Forms(
        attributes=(*sorted(composed - set(UNSEEN_ATTRIBUTES)), *[*ATTRIBUTES] * 30),
        statements=_table(rng, _mixed(g.TABLES["statements"], _random_fact), _dressed),
        questions=_table(rng, _mixed(g.TABLES["questions"], _random_fact), _dressed),
        pairs=tuple(_pairs(rng) for _ in range(COUNT)),
        assignments=_table(rng, _mixed(g.TABLES["assignments"], _random_pair), _dressed),
        aliases=_table(rng, _mixed((*g.TABLES["assignments"], *g.TABLES["aliases"]), _random_pair), _dressed),
        traces=_table(rng, _mixed(g.TABLES["traces"], _random_trace), _prefixed),
        listed=_table(rng, _mixed(g.TABLES["listed"], _random_listed), _dressed),
        listed_questions=_table(rng, _mixed(g.TABLES["listed questions"], _random_naming), _prefixed),
        passages=tuple(_passage(rng) for _ in range(COUNT)),
        word_lists=tuple(_word_list(rng) for _ in range(COUNT)),
        people={fact: tuple(_person(rng, fact) for _ in range(COUNT)) for fact in g.FACTS},
    )


def runs(form: str, size: int = _RUN) -> set[tuple[str, ...]]:
    """Every `size` words and signs in a row, in small letters; the whole form when it is shorter."""
    found = _TOKEN.findall(form.lower())
    return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))}


@lru_cache(maxsize=1)
def kept_out() -> tuple[frozenset[tuple[str, ...]], frozenset[str]]:
    """(runs of the held-out forms, shorter held-out forms as words and signs with spaces around)."""
    every = [run for form in all_forms(forms_of("unseen")) if form for run in runs(form)]
    long = frozenset(run for run in every if len(run) == _RUN)
    return long, frozenset(f" {' '.join(run)} " for run in every if len(run) < _RUN)


def all_forms(forms: Forms) -> Iterable[str]:
    """Every single string of a set of forms."""
    yield from (*forms.statements, *forms.questions, *forms.assignments, *forms.aliases, *forms.traces)
    yield from (*forms.listed, *forms.listed_questions)
    for head, row, tail, questions in forms.pairs:
        yield from (head, row, tail, *questions)
    for pair in (*forms.passages, *forms.word_lists, *(p for table in forms.people.values() for p in table)):
        yield from pair


def _allowed(form: str) -> bool:
    long, short = kept_out()
    tokens = f" {' '.join(_TOKEN.findall(form.lower()))} "
    return not runs(form) & long and not any(whole in tokens for whole in short)


def _fill(rng: Random, pattern: str, **words: str) -> str:
    """One of the texts of a pattern: ((one|two|)) is an alternative, NOUN and the like are replaced."""
    for name, word in words.items():
        pattern = pattern.replace(name, word)
    text = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), pattern)
    return _tidy(text)


def _tidy(text: str) -> str:
    """No space at the ends, no two in a row."""
    return re.sub(r" +", " ", text).strip()


def _until_allowed(rng: Random, draw: Draw) -> str:
    while True:
        form = draw(rng)
        if _allowed(form):
            return form


def _table(rng: Random, draw: Draw, finish: Callable[[Random, str], str]) -> tuple[str, ...]:
    return tuple(_until_allowed(rng, lambda r: finish(r, draw(r))) for _ in range(COUNT))


def _mixed(patterns: tuple[str, ...], random_form: Draw) -> Draw:
    """A form of the grammar, or one of random words."""
    return lambda rng: (
        random_form(rng) if rng.random() < RANDOM_SHARE else _fill(rng, rng.choice(patterns), SEP=_sep(rng))
    )


def _sep(rng: Random) -> str:
    return rng.choice(g.SEPARATORS)


def _prefixed(rng: Random, form: str) -> str:
    return rng.choice(g.PREFIXES) + form if rng.random() < 0.4 else form


def _dressed(rng: Random, form: str) -> str:
    """The form as it is, or in a comment, a list, brackets and so on."""
    before, behind = rng.choice(g.WRAPPERS) if rng.random() < 0.4 else ("", "")
    return before + form + behind


def _words(rng: Random, least: int = 0, most: int = 3) -> str:
    return " ".join(rng.choices(_VOCABULARY, k=rng.randint(least, most)))


def _joined(rng: Random, *slots: str) -> str:
    """Slots in this order with random words, separators or brackets between."""
    parts: list[str] = []
    for slot in slots:
        parts += [_words(rng), rng.choice(("", "", _sep(rng))), slot.join(rng.choice(g.QUOTES))]
    return _tidy(" ".join(parts))


def _random_fact(rng: Random) -> str:
    slots = ["{n}", rng.choice(("{a}", "{A}", "{a}", ""))]
    rng.shuffle(slots)
    return _joined(rng, *(slot for slot in slots if slot)) + _before_value(rng)


def _random_pair(rng: Random) -> str:
    return _joined(rng, "{n}") + _before_value(rng)


def _before_value(rng: Random) -> str:
    return rng.choice((" " + _words(rng, 1, 2) + " {v}", rng.choice(g.BEFORE_VALUE)))


def _random_trace(rng: Random) -> str:
    end = rng.choice((" {n} ->", ": {n} ->", ", {n} ->", " ({n}) {n} ->", " - {n} ->"))
    return (_words(rng, 0, 4) + end).strip()


def _random_listed(rng: Random) -> str:
    between = rng.choice((" ", " ", " ", " ", "-", ".", " #", "/"))
    return f"{_words(rng)} {{n}}{between}{{i}}".strip() + _before_value(rng)


def _random_naming(rng: Random) -> str:
    """Random words around a name, with nothing to follow from."""
    return _joined(rng, "{n}") + rng.choice(
        ("", ":", " =", "?", "; " + _words(rng, 1, 2), " " + _words(rng, 1, 2))
    )


def _pairs(rng: Random) -> tuple[str, str, str, tuple[str, ...]]:
    """(line in front, row, line behind, questions), drawn independently of each other."""
    head = _until_allowed(rng, lambda r: _fill(r, r.choice(g.PAIR_HEADS), SEP=_sep(r)))
    row = _until_allowed(rng, lambda r: _prefixed(r, _mixed(g.TABLES["pair rows"], _random_pair)(r)))
    echo = row.partition("{v}")[0] + "{v}"
    asked = [_mixed(g.TABLES["pair questions"], _random_pair), lambda r: f"{r.choice(g.ECHOES)} {echo}"]
    questions = tuple(_until_allowed(rng, lambda r: _prefixed(r, r.choice(asked)(r))) for _ in range(3))
    return head, row, rng.choice(g.PAIR_TAILS), questions


def _two(rng: Random, first: Draw, second: Draw) -> tuple[str, str]:
    return _until_allowed(rng, first), _until_allowed(rng, second)


def _passage(rng: Random) -> tuple[str, str]:
    noun = rng.choice(g.TABLES["passage nouns"])
    heads = _mixed(g.TABLES["passages"], _random_naming)
    questions = _mixed(g.TABLES["passage questions"], _random_naming)
    return _two(
        rng,
        lambda r: _prefixed(r, heads(r).replace("NOUN", noun)),
        lambda r: _prefixed(
            r, questions(r).replace("NOUN", noun if r.random() < 0.8 else r.choice(g.TABLES["passage nouns"]))
        ),
    )


def _word_list(rng: Random) -> tuple[str, str]:
    noun = rng.choice((*g.TABLES["list nouns"], rng.choice(WORDS) + "s"))
    heads = _mixed(
        g.TABLES["word lists"], lambda r: _words(r, 1, 3) + r.choice((":", " =", "", ";", " -", ")"))
    )
    questions = _mixed(
        g.TABLES["word list questions"], lambda r: _words(r, 1, 4) + r.choice((":", " =", "", "?", " is"))
    )
    return _two(
        rng,
        lambda r: _prefixed(r, heads(r).replace("NOUN", noun)),
        lambda r: _prefixed(r, questions(r).replace("NOUN", noun)),
    )


def _person(rng: Random, fact: str) -> tuple[str, str]:
    """(statement, question) on one fact; of random words, the question repeats some of the statement's."""
    nouns, statements, questions = (
        g.TABLES[f"{fact} {part}"] for part in ("nouns", "statements", "questions")
    )
    if rng.random() < RANDOM_SHARE:
        cue = rng.choice((rng.choice(nouns), _words(rng, 1, 2)))
        return _two(
            rng,
            lambda r: _tidy(r.choice((f"{_words(r)} {cue} {{n}}", f"{{n}} {cue} {_words(r)}")) + " {v}."),
            lambda r: _tidy(
                f"{_words(r)} {r.choice((f'{cue} {{n}}', f'{{n}} {cue}'))}{r.choice(g.BEFORE_VALUE)}"
            ),
        )
    words = {"NOUN": rng.choice(nouns)}
    return _two(
        rng,
        lambda r: _dressed(r, _fill(r, r.choice((*statements, *g.TABLES["people statements"])), **words)),
        lambda r: _prefixed(
            r, _fill(r, r.choice((*questions, *g.TABLES["people questions"])), NOUN=r.choice(nouns))
        ),
    )

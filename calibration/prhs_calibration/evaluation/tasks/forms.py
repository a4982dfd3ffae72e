"""Surface forms of stated and asked facts: prose, code comments, key-value lines, JSON and table rows.

Slots: {a} attribute, {A} the same with underscores, {n} name, {v} value. A space before a slot belongs to
the slot. The forms under "unseen" are for evaluation only.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

from .types import Answer, Line, Piece, Question, Source, Templates

_FORM = re.compile(r"( ?\{\w\})")

STATEMENTS: dict[Templates, tuple[str, ...]] = {
    "seen": (
        "The {a} of {n} is {v}.",
        "Note that the {a} for {n} is {v}.",
        "Remember: {n} has the {a} {v}.",
        "{n} was given the {a} {v}.",
        "In the register {n} is listed with {a} {v}.",
        "For {n} the {a} reads {v}, as everybody knows.",
        "They wrote to {n} that the {a} had become {v}.",
        "When {n} arrived, the {a} was set to {v}.",
        "# {n}: the {a} is {v}",
        "# {a} of {n}: {v}",
        "// {n} uses {a} {v}",
        "/* {a} for {n} = {v} */",
        "-- {n}, {a}, {v}",
        "# NOTE({n}): {a} is now {v}",
        "; {n} {a} {v}",
        "{n}.{A} = {v}",
        '{A}["{n}"] = {v}',
        "{n}: {A}={v}",
        "[{n}] {A}: {v}",
        "{n}/{A}: {v}",
        "set {n} {A} {v}",
        '{"name": "{n}", "{A}": "{v}"}',
        '{"owner": "{n}", "kind": "{A}", "value": {v}}',
        '"{n}": {"{A}": {v}},',
        "{'{n}': ('{A}', '{v}')}",
        "| {n} | {a} | {v} |",
        "{n},{A},{v}",
        "<tr><td>{n}</td><td>{a}</td><td>{v}</td></tr>",
        "{n} ; {a} ; {v}",
        "* {n} - {a} - {v}",
    ),
    "unseen": (
        "Everyone in the village agreed that {n} must use the {a} {v}.",
        "According to the letter, {n} now owns {a} {v}.",
        "By the way, the {a} belonging to {n} equals {v}.",
        "% {n} -> {a} -> {v}",
        "REM {n}, whose {a} is {v}",
        "put({n}, {A}, {v})",
        "{n}::{A} := {v}",
        "<entry key='{n}' type='{A}'>{v}</entry>",
        '- {id: {n}, {A}: "{v}"}',
        "|| {n} || {A} || {v} ||",
    ),
}
QUESTIONS: dict[Templates, tuple[str, ...]] = {
    "seen": (
        "Question: what is the {a} of {n}? Answer: {v}",
        "Q: {n}, {a}? A: {v}",
        "As noted above, the {a} of {n} is {v}",
        "Which {a} does {n} have? It is {v}",
        "# recall {n} {a}: {v}",
        "# the {a} of {n} was {v}",
        "assert {A}({n}) == {v}",
        'print({A}["{n}"])  # {v}',
        '{"ask": "{n}", "{A}": "{v}"}',
        "| ask | {n} | {a} | {v} |",
        "? {n},{A},{v}",
    ),
    "unseen": (
        "Please tell me the {a} that belongs to {n}: {v}",
        "Do you still know {n} and the {a}? Yes, {v}",
        "/* look up {a}, {n}: {v} */",
        "get({n}, {A}) -> {v}",
        "<ask key='{n}' type='{A}'>{v}</ask>",
    ),
}


@lru_cache(maxsize=4096)
def _split(form: str) -> tuple[str, ...]:
    """Alternating literals and slots."""
    return tuple(part for part in _FORM.split(form) if part)


def fill(form: str, slots: Mapping[str, str]) -> tuple[Line, int]:
    """(line, index of the piece that holds the value or -1). Literals and attributes are predictable."""
    pieces: list[Piece] = []
    value = -1
    for part in _split(form):
        if not _FORM.fullmatch(part):
            pieces.append(Piece(part, predictable=True))
            continue
        key = part[-2]
        if key == "v":
            value = len(pieces)
        pieces.append(Piece(part[:-3] + slots[key], predictable=key in "aA"))
    return tuple(pieces), value


def ask(form: str, slots: Mapping[str, str], source: Source) -> Question:
    """The form up to its value as prompt and the value as answer; what follows a value is left out."""
    line, value = fill(form, slots)
    return Question(line[:value], (Answer(line[value].text, source=source),), (slots["v"],))

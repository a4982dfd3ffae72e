"""What a task is made of, before any tokenizer: lines with slots, blocks of lines, questions with answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Templates = Literal["seen", "unseen"]
Source = tuple[int, int, int]  # (block, line, piece) that holds the text of an answer


class Tokenizer(Protocol):
    """What tasks need of a tokenizer: a Hugging Face one, or anything that is called like it."""

    def __hash__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> "Encoding": ...


class Encoding(Protocol):
    """Result of a tokenizer call."""

    input_ids: list[int]


@dataclass(frozen=True)
class Example:
    """One item: `context_ids` are prefill; question and answer are decode steps, teacher forced.

    The three together have exactly the length asked for. Exact match: every token of `answer_ids` is the
    argmax given all tokens before it. `answers` are the texts that make up a right answer, in their order.
    """

    context_ids: list[int]
    question_ids: list[int]
    answer_ids: list[int]
    answers: tuple[str, ...]

    @property
    def input_ids(self) -> list[int]:
        """All tokens in order."""
        return [*self.context_ids, *self.question_ids, *self.answer_ids]


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenised by itself. `predictable`: it could be foreseen from what precedes.

    Pieces begin where a pre-tokenizer breaks the text anyway (before a space, between letters and
    punctuation), so that tokenising pieces one by one gives what tokenising the whole line gives.
    """

    text: str
    predictable: bool = False


@dataclass(frozen=True)
class Answer(Piece):
    """A piece that the model has to produce; `source` says where in the episode its text was stated."""

    source: Source | None = None


Line = tuple[Piece, ...]
Block = tuple[Line, ...]  # consecutive lines


@dataclass(frozen=True)
class Question:
    """What is asked (`prompt`, starts on a line of its own) and the answer that continues it."""

    prompt: Line
    answer: tuple[Piece, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Episode:
    """Blocks to plant anywhere, in any order, and questions to ask after all of them."""

    blocks: tuple[Block, ...] = ()
    questions: tuple[Question, ...] = field(default=())


@dataclass(frozen=True)
class Forms:
    """Surface forms of all tasks; slots as in `forms`, tables as in `structures` and `people`."""

    attributes: Sequence[str]
    statements: Sequence[str]
    questions: Sequence[str]
    pairs: Sequence[tuple[str, str, str, tuple[str, ...]]]
    assignments: Sequence[str]
    aliases: Sequence[str]
    traces: Sequence[str]
    listed: Sequence[str]
    listed_questions: Sequence[str]
    passages: Sequence[tuple[str, str]]
    word_lists: Sequence[tuple[str, str]]
    people: Mapping[str, Sequence[tuple[str, str]]]


def text_of(pieces: tuple[Piece, ...]) -> str:
    """The text of a line, without its line break."""
    return "".join(piece.text for piece in pieces)

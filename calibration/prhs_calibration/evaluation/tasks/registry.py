"""The tasks by name, with the sizes used in evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from prhs_kernels.errors import UsageError

from . import episodes
from .assemble import assemble, plain_text
from .types import Episode, Example, Templates, Tokenizer

Draw = Callable[[Random, Templates, int], Episode]
SCORED_TEXT_TOKENS = 128


@dataclass(frozen=True)
class Task:
    """A task: `draw(rng, templates, length)` makes its content; without one it is plain text.

    metric: "exact" (all answer tokens right) or "likelihood" (mean nats per answer token).
    """

    name: str
    description: str
    metric: Literal["exact", "likelihood"]
    draw: Draw | None

    def build(self, tokenizer: Tokenizer, *, length: int, seed: int, templates: Templates) -> Example:
        """Item number `seed` of exactly `length` tokens, in held-out text.

        templates "seen" uses forms and entities that the reference model was trained with (never the same
        items or text), "unseen" forms and entities kept out of its training. UsageError when `length` is too
        short for what has to be planted.
        """
        if templates not in get_args(Templates):
            raise UsageError(
                f"templates {templates!r} is unknown; use one of {', '.join(get_args(Templates))}"
            )
        if length < 2:
            raise UsageError(f"length {length} is less than 2; ask for a longer prompt")
        rng = Random(f"{self.name}/{templates}/{length}/{seed}")
        if self.draw is None:
            return plain_text(tokenizer, length=length, scored=SCORED_TEXT_TOKENS, rng=rng)
        return assemble(tokenizer, self.draw(rng, templates, length), length=length, rng=rng)


def _many(length: int, tokens_each: int, most: int) -> int:
    """As many as fill a third of the length, at least 2 and at most `most`."""
    return max(2, min(most, length // (3 * tokens_each)))


_TASKS = (
    Task(
        "single_needle",
        "one stated number in text, asked for at the end",
        "exact",
        lambda rng, templates, length: episodes.facts(rng, templates, count=1, asked=1),
    ),
    Task(
        "multi_key_needle",
        "one of up to 64 numbers stated alike under different names",
        "exact",
        lambda rng, templates, length: episodes.facts(
            rng, templates, count=_many(length, 24, 64), asked=1, alike=True
        ),
    ),
    Task(
        "lookup_64",
        "one of 64 pairs in a table, dictionary or list",
        "exact",
        lambda rng, templates, length: episodes.pairs(rng, templates, count=64, asked=1),
    ),
    Task(
        "variable_tracking",
        "a variable that stands for another one that holds a number, among 8 such chains",
        "exact",
        lambda rng, templates, length: episodes.chains(rng, templates, count=_many(length, 24, 8), asked=1),
    ),
    Task(
        "multi_value",
        "all four numbered values of a name, among 4 such names",
        "exact",
        lambda rng, templates, length: episodes.listed(rng, templates, count=_many(length, 72, 4), asked=1),
    ),
    Task(
        "common_word",
        "the word that makes up a quarter of scattered word lists",
        "exact",
        lambda rng, templates, length: episodes.common_word(
            rng, templates, words=max(16, min(320, length // 12)), lines=8
        ),
    ),
    Task(
        "paragraph_question",
        "a fact from one of 4 planted paragraphs about people",
        "exact",
        lambda rng, templates, length: episodes.paragraphs(
            rng, templates, count=_many(length, 72, 4), asked=1
        ),
    ),
    Task(
        "copy_span",
        "a named passage of 24 random words, one of 3, word by word",
        "exact",
        lambda rng, templates, length: episodes.passages(
            rng, templates, count=_many(length, 72, 3), asked=1, words=24
        ),
    ),
    Task("perplexity", "likelihood of the end of a stretch of held-out text", "likelihood", None),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}

"""Put an episode into held-out text: context, question and answer have exactly the tokens asked for."""

from functools import lru_cache
from random import Random

from prhs_kernels.errors import UsageError

from .types import Answer, Episode, Example, Question, Tokenizer, text_of

FRONT = 0.04  # share of the context that holds text only, in front of everything planted
_ANCHOR = "x"  # tokenised in front of a continuation, so that no tokenizer adds its own prefix to it


def assemble(tokenizer: Tokenizer, episode: Episode, *, length: int, rng: Random) -> Example:
    """Plant all blocks in text and end with the first question; UsageError when `length` holds no room."""
    question = episode.questions[0]
    question_ids, answer_ids = _ending(tokenizer, question)
    room = length - len(question_ids) - len(answer_ids)
    texts = ["\n".join(text_of(line) for line in block) for block in episode.blocks]
    needed = sum(len(continuation(tokenizer, "\n" + text)) for text in texts)
    if needed > 0.9 * room:
        raise UsageError(
            f"length {length} is too short: question and planted lines alone take {length - room + needed} "
            f"tokens; ask for at least {int(1.2 * (length - room + needed))}"
        )
    context = _context(tokenizer, texts, needed, room, rng)
    return Example(context, question_ids, answer_ids, question.answers)


def plain_text(tokenizer: Tokenizer, *, length: int, scored: int, rng: Random) -> Example:
    """`length` tokens of held-out text, the last `scored` of them (fewer in short texts) as the answer."""
    ids = [*_special(tokenizer), *_text_tokens(tokenizer, length, rng)][:length]
    cut = length - min(scored, max(1, length // 2))
    return Example(ids[:cut], [], ids[cut:], ())


def _context(tokenizer: Tokenizer, texts: list[str], needed: int, room: int, rng: Random) -> list[int]:
    special = _special(tokenizer)
    front = max(1, int(FRONT * room))
    filler = room - len(special) - front - needed
    while True:
        body = continuation(tokenizer, _plant(_lines(tokenizer, max(0, filler), rng), texts, rng))
        missing = room - len(special) - len(body)
        if missing >= 0:
            break
        filler += missing - 8
    text = _text_tokens(tokenizer, missing, rng)
    return [*special, *(text[-missing:] if missing else []), *body]


def _plant(lines: list[str], texts: list[str], rng: Random) -> str:
    """Every text on lines of its own, at a random place between the lines; starts with a line break."""
    cuts = sorted((rng.randint(0, len(lines)), order) for order in range(len(texts)))
    placed: list[str] = []
    done = 0
    for place, order in cuts:
        placed += lines[done:place]
        placed.append(texts[order])
        done = place
    return "".join("\n" + text for text in [*placed, *lines[done:]])


def _lines(tokenizer: Tokenizer, tokens: int, rng: Random) -> list[str]:
    """Consecutive lines of held-out text that make at most about `tokens` tokens."""
    per_token = _chars_per_token(tokenizer)
    lines = _span(int(tokens * per_token * 1.1) + 200, rng).split("\n")[1:-1]
    lines = [line for line in lines if line.strip()]
    used = 0
    for count, line in enumerate(lines):
        used += len(continuation(tokenizer, "\n" + line))
        if used > tokens:
            return lines[:count]
    return lines


def _text_tokens(tokenizer: Tokenizer, tokens: int, rng: Random) -> list[int]:
    """Exactly `tokens` tokens of consecutive held-out text that begins with a line."""
    if tokens == 0:
        return []
    chars = int(tokens * _chars_per_token(tokenizer) * 1.3) + 200
    while True:
        text = _span(chars, rng)
        ids = continuation(tokenizer, text[text.find("\n") :])
        if len(ids) >= tokens:
            return ids[:tokens]
        chars *= 2


def _span(chars: int, rng: Random) -> str:
    text = held_out_text()
    if chars >= len(text):
        raise UsageError(
            f"the held-out text holds {len(text)} characters and {chars} are needed; ask for less"
        )
    start = rng.randrange(len(text) - chars)
    return text[start : start + chars]


def held_out_text() -> str:
    """Text no reference model was trained on."""
    from ...corpus import built_in_text

    return built_in_text()


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of `text` as they follow other text."""
    head = _anchor(tokenizer)
    ids = list(tokenizer(_ANCHOR + text, add_special_tokens=False, verbose=False).input_ids)
    if tuple(ids[: len(head)]) == head:
        return ids[len(head) :]
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _ending(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """(question tokens, answer tokens); the answer starts where its first piece to be produced starts.

    A space that is a token of its own in front of the answer belongs to the question: it is layout, and
    whether a model foresees it says nothing about what it remembers.
    """
    first = next(i for i, piece in enumerate(question.answer) if isinstance(piece, Answer))
    prompt = "\n" + text_of(question.prompt) + text_of(question.answer[:first])
    asked = continuation(tokenizer, prompt)
    both = continuation(tokenizer, prompt + text_of(question.answer[first:]))
    spaced = continuation(tokenizer, prompt + " ")
    if len(spaced) < len(both) and both[: len(spaced)] == spaced:
        asked = spaced
    if both[: len(asked)] == asked:
        return asked, both[len(asked) :]
    return asked, continuation(tokenizer, text_of(question.answer[first:]))


@lru_cache(maxsize=8)
def _anchor(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer(_ANCHOR, add_special_tokens=False, verbose=False).input_ids)


@lru_cache(maxsize=8)
def _chars_per_token(tokenizer: Tokenizer) -> float:
    sample = held_out_text()[:20_000]
    return len(sample) / len(tokenizer(sample, add_special_tokens=False, verbose=False).input_ids)


@lru_cache(maxsize=8)
def _special(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens the tokenizer puts in front of a text."""
    plain = list(tokenizer(_ANCHOR, add_special_tokens=False, verbose=False).input_ids)
    full = list(tokenizer(_ANCHOR, add_special_tokens=True, verbose=False).input_ids)
    for start in range(len(full)):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()

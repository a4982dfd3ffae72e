"""Training rows with long-range tasks: episodes of the evaluation tasks' seen forms spliced into text.

Wider wordings (`wordings`) take the place of the seen forms in the share of the episodes asked for.
One row holds several episodes and asks many questions at random distances, so that every row teaches recall
at every distance up to its length. Pure Python over cached token pieces, to run in worker processes.
"""

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..evaluation.tasks.types import Answer, Episode, Line, Piece, Question
from .batches import line_starts
from .task_draws import DRAW, episode_weights
from .tokenizer import BOS_ID, EOS_ID
from .wordings import wordings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_SHARE, REPEAT_SHARE = 0.22, 0.06  # of the rows; the others hold tasks
FAVOURED_SHARE = 0.25  # of the text is drawn from the favoured front of the tokens
_LAST_PLACE = 0.92  # share of a row's text after which nothing is planted any more
_AT_END = 0.35  # share of the questions that wait for the end of the row


@dataclass(frozen=True)
class TaskBatch:
    """Arrays of one step; positions are flat, row * T + column.

    ids [B, T] uint16; text_mask [B, T] bool, true where the token is predictable text; answers [M] int64,
    positions of answer tokens; planted [M] int64, position of the same token where it was stated, or -1;
    items [M] int64, which question each answer token belongs to; kinds, the task of every question.
    """

    ids: npt.NDArray[np.uint16]
    text_mask: npt.NDArray[np.bool_]
    answers: npt.NDArray[np.int64]
    planted: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    kinds: tuple[str, ...]


@dataclass
class _Segment:
    """Tokens to splice in at `place` (share of the text), with where its pieces start."""

    place: float
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    starts: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # (line, piece) -> span
    answers: list[tuple[int, int, "_Segment | None", tuple[int, int]]] = field(default_factory=list)
    kind: str = ""
    prompt: int = 0  # tokens of a question in front of what answers it
    at: int = 0  # first position in the row, once placed


class TaskRows:
    """Draws batches from tokenised text; a pure function of (seed, step, length), cheap to fork."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        tokens: npt.NDArray[np.uint16],
        seed: int,
        favoured: int = 0,
        *,
        wide: float = 0.0,
        emphasis: str = "",
    ) -> None:
        """wide: share of the episodes that are worded by `wordings`; emphasis: see `episode_weights`."""
        self.tokenizer, self.tokens, self.seed, self.favoured = tokenizer, tokens, seed, favoured
        self.wide, self.weights = wide, episode_weights(emphasis)
        if wide:
            wordings()  # before any worker is forked, so that all share the tables
        self.line_starts = line_starts(tokenizer, tokens)
        self._cache: dict[str, tuple[int, ...]] = {}

    def batch(self, step: int, length: int, rows: int) -> TaskBatch:
        """The batch of one step."""
        rng = Random(f"{self.seed}/{step}/{length}")
        ids = np.empty((rows, length), dtype=np.uint16)
        mask = np.empty((rows, length), dtype=np.bool_)
        answers: list[int] = []
        planted: list[int] = []
        items: list[int] = []
        kinds: list[str] = []
        for row in range(rows):
            segments = self._row(rng, ids[row], mask[row])
            for segment in segments:
                if not segment.answers:
                    continue
                for begin, count, source, (first, _) in segment.answers:
                    for offset in range(count):
                        position = segment.at + begin + offset
                        if position >= length:
                            continue
                        answers.append(row * length + position)
                        planted.append(row * length + source.at + first + offset if source else -1)
                        items.append(len(kinds))
                kinds.append(segment.kind)
        as_array = lambda values: np.array(values, dtype=np.int64)  # noqa: E731
        return TaskBatch(ids, mask, as_array(answers), as_array(planted), as_array(items), tuple(kinds))

    def _row(self, rng: Random, ids: npt.NDArray[np.uint16], mask: npt.NDArray[np.bool_]) -> list[_Segment]:
        kind = rng.random()
        if kind < REPEAT_SHARE:
            self._repeats(rng, ids, mask)
            return []
        segments = self._segments(rng, len(ids)) if kind >= REPEAT_SHARE + TEXT_SHARE else []
        self._splice(rng, segments, ids, mask)
        return segments

    def _splice(
        self,
        rng: Random,
        segments: list[_Segment],
        ids: npt.NDArray[np.uint16],
        mask: npt.NDArray[np.bool_],
    ) -> None:
        """Fill a row with text and put every segment at the first line start after its place."""
        length = len(ids)
        ids[0], mask[:] = BOS_ID, True
        mask[0] = False
        size = length - 1 - sum(len(segment.ids) for segment in segments)
        start = self._start(rng, size)
        text, breaks = (
            self.tokens[start : start + size],
            np.flatnonzero(self.line_starts[start : start + size]),
        )
        write, read = 1, 0
        for segment in sorted(segments, key=lambda s: s.place):
            index = int(np.searchsorted(breaks, int(segment.place * size)))
            place = max(read, int(breaks[index]) if index < len(breaks) and segment.place < 1 else size)
            ids[write : write + place - read] = text[read:place]
            write, read = write + place - read, place
            segment.at = write
            ids[write : write + len(segment.ids)] = segment.ids
            mask[write : write + len(segment.ids)] = segment.mask
            write += len(segment.ids)
        ids[write:] = text[read:]

    def _start(self, rng: Random, size: int) -> int:
        end = self.favoured if self.favoured > size and rng.random() < FAVOURED_SHARE else len(self.tokens)
        return rng.randrange(max(1, end - size))

    def _repeats(self, rng: Random, ids: npt.NDArray[np.uint16], mask: npt.NDArray[np.bool_]) -> None:
        """A span of text or of random tokens, again and again with text between."""
        self._splice(rng, [], ids, mask)
        length = len(ids)
        size = rng.randint(8, max(9, min(512, length // 6)))
        random_span = rng.random() < 0.5
        if random_span:
            span = np.array(
                [rng.randrange(EOS_ID + 1, len(self.tokenizer)) for _ in range(size)], dtype=np.uint16
            )
        else:
            start = self._start(rng, size)
            span = self.tokens[start : start + size]
        at, first = 1 + rng.randrange(length // 4), True
        while at + size < length:
            ids[at : at + size], mask[at : at + size] = span, not (first and random_span)
            at, first = at + size + rng.randint(1, max(2, length // 3)), False

    def _segments(self, rng: Random, length: int) -> list[_Segment]:
        """Episodes until a random share of the row is used up."""
        room = int(length * rng.uniform(0.2, 0.65))
        segments: list[_Segment] = []
        misses = 0
        while misses < 3 and room > 30:
            wide = bool(self.wide) and rng.random() < self.wide
            kind = rng.choices(list(DRAW), self.weights[wide])[0]
            episode = DRAW[kind](rng, room, wordings() if wide else None)
            made = self._episode(rng, f"wide_{kind}" if wide else kind, episode, scored=not wide)
            size = sum(len(segment.ids) for segment in made)
            if size > room:
                misses += 1
                continue
            segments += made
            room -= size
        return segments

    def _episode(self, rng: Random, kind: str, episode: Episode, scored: bool) -> list[_Segment]:
        """Segments of an episode; `scored`: its fixed wording counts as predictable text."""
        blocks = [self._block(rng.uniform(0, _LAST_PLACE), block) for block in episode.blocks]
        last = max(block.place for block in blocks)
        asked = [self._question(kind, question, blocks) for question in episode.questions]
        for segment in asked:
            segment.place = 1.0 if rng.random() < _AT_END else rng.uniform(last + 1e-6, 1.0)
        if not scored:
            for block in blocks:
                block.mask = [False] * len(block.ids)
            for segment in asked:
                segment.mask[: segment.prompt] = [False] * segment.prompt
        return blocks + asked

    def _block(self, place: float, block: tuple[Line, ...]) -> _Segment:
        segment = _Segment(place)
        for number, line in enumerate(block):
            self._extend(segment, Piece("\n", predictable=True))
            for index, piece in enumerate(line):
                segment.starts[number, index] = (len(segment.ids), len(self.encode(piece.text)))
                self._extend(segment, piece)
        return segment

    def _question(self, kind: str, question: Question, blocks: list[_Segment]) -> _Segment:
        segment = _Segment(1.0, kind=kind)
        for piece in (Piece("\n", predictable=True), *question.prompt):
            self._extend(segment, piece)
        segment.prompt = len(segment.ids)
        for piece in question.answer:
            begin = len(segment.ids)
            self._extend(segment, piece)
            if isinstance(piece, Answer):
                answer = self._aligned(begin, piece, blocks)
                segment.answers.append(answer)
                segment.mask[begin : answer[0]] = [True] * (answer[0] - begin)
        return segment

    def _aligned(
        self, begin: int, piece: Answer, blocks: list[_Segment]
    ) -> tuple[int, int, _Segment | None, tuple[int, int]]:
        """(first position, tokens, where it was stated, first position there and its tokens).

        The two texts may differ by the space in front; then they are aligned by their ends, and the extra
        token of the answer counts as text.
        """
        ids = self.encode(piece.text)
        if piece.source is None:
            return begin, len(ids), None, (0, 0)
        block, line, index = piece.source
        first, count = blocks[block].starts[line, index]
        stated = blocks[block].ids[first : first + count]
        common = 0
        while common < min(len(ids), count) and ids[-1 - common] == stated[-1 - common]:
            common += 1
        if common == 0:
            return begin, len(ids), None, (0, 0)
        return begin + len(ids) - common, common, blocks[block], (first + count - common, common)

    def _extend(self, segment: _Segment, piece: Piece) -> None:
        ids = self.encode(piece.text)
        segment.ids.extend(ids)
        segment.mask.extend([piece.predictable] * len(ids))

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of one piece."""
        ids = self._cache.get(text)
        if ids is None:
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            if len(self._cache) < 400_000 and not text[-1:].isdigit():
                self._cache[text] = ids
        return ids

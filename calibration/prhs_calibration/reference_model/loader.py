"""Worker processes that make batches ahead of the training step, at a length that may change at any time."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

from .task_rows import TaskBatch, TaskRows

_AHEAD = 2  # batches each worker keeps ready


class Loader:
    """Batches of `tokens_per_batch` tokens for steps `first`, `first` + 1, ...

    `length_of(step)` fixes the row length of a step. Without it the length follows `set_length`, and what the
    workers had ready is still handed out: a change costs no waiting. `workers` = 0 works in this process.
    """

    def __init__(
        self,
        source: TaskRows,
        *,
        tokens_per_batch: int,
        workers: int,
        length: int,
        length_of: Callable[[int], int] | None = None,
        first: int = 0,
    ) -> None:
        self.source, self.tokens_per_batch, self.length_of = source, tokens_per_batch, length_of
        self.step = self._first = first
        context = multiprocessing.get_context("fork")
        self._length = context.Value("i", length)
        self._queues: list[Any] = [context.Queue(_AHEAD) for _ in range(workers)]
        self._processes = [
            context.Process(target=self._work, args=(first + index, workers, ready), daemon=True)
            for index, ready in enumerate(self._queues)
        ]
        for process in self._processes:
            process.start()

    def set_length(self, length: int) -> None:
        """Row length of the batches that are not made yet."""
        self._length.value = length

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        if not self._queues:
            batch = self._make(self.step)
        else:
            batch = self._queues[(self.step - self._first) % len(self._queues)].get()
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop the workers. Nothing is read from them any more: a batch cut off half-way would never end."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)

    def _make(self, step: int) -> TaskBatch:
        length = self.length_of(step) if self.length_of else int(self._length.value)
        return self.source.batch(step, length, max(1, self.tokens_per_batch // length))

    def _work(self, first: int, stride: int, ready: Any) -> None:
        step = first
        while True:
            ready.put(self._make(step))
            step += stride

"""What every comparison method is, and a method at a budget as the runtime takes it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.rows import DecodeRows, uniform_size


class Baseline(abc.ABC):
    """A method and its configuration: a frozen dataclass, one per file, the publication in its docstring.

    name: in results and plots. exact: the size it is asked for is the size it keeps; where it is not, an
    equal budget has to be searched with `at`. reads_prompt: it needs the prompt's queries. needs_fit: it has
    to be `fitted` to a model first.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False

    @abc.abstractmethod
    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Sets of about `size [num_kv_heads, num_steps]` positions for a run of steps.

        Steps and layers come in order, steps of one layer together; what is needed later goes to
        `rows.memory.notes`.
        """

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """As in the publication, at its budget; empty where there is none."""
        return ()

    def at(self, dial: float) -> AtBudget:
        """The method where the dial in (0, 1] sets what it spends, more at a larger dial."""
        return AtBudget(self, dial)

    def fitted(self, prompts: Iterable[Sequence[DecodeRows]]) -> Baseline:
        """With what is chosen offline; `prompts` gives, for each prompt, some rows of every layer."""
        return self


@dataclasses.dataclass(frozen=True)
class AtBudget:
    """`method` with the same budget in every head and step: a `StepSelector`.

    What it keeps and reads is counted as it happens, so that methods which keep whole pages can be compared
    at the budget they really had.
    """

    method: Baseline
    fraction: float = 0.0  # of the visible positions, or of the prompt
    tokens: int = 0  # positions; the larger of the two counts
    dense_layers: tuple[int, ...] = ()  # that the publication exempts
    full_layers: tuple[int, ...] = ()  # that attend to everything and choose for others
    of_prompt: bool = False  # the fraction stays what it was when decoding began
    label: str = ""  # what is asked for, where it is neither

    def __post_init__(self) -> None:
        if not (0 <= self.fraction <= 1 and self.tokens >= 0 and (self.fraction or self.tokens)):
            raise UsageError(f"budget {self.fraction} must be a fraction of the visible positions in (0, 1]")

    def choose(self, rows: DecodeRows) -> Choice:
        """Sets of a run of steps; see `prhs_kernels.selectors.base.StepSelector`."""
        if rows.layer in self.dense_layers:
            return everything(rows)
        choice = self.method.select(rows, self._size(rows))
        if rows.layer in self.full_layers:
            whole = everything(rows)
            return dataclasses.replace(choice, kept=whole.kept, rows_read=whole.rows_read)
        return choice

    def _size(self, rows: DecodeRows) -> torch.Tensor:
        if not self.fraction:
            return torch.full((rows.num_kv_heads, len(rows.positions)), self.tokens, device=rows.keys.device)
        if self.of_prompt:
            size = max(round(self.fraction * rows.prompt.length), self.tokens, 1)
            return torch.full((rows.num_kv_heads, len(rows.positions)), size, device=rows.keys.device)
        return uniform_size(rows, self.fraction).clamp(min=self.tokens)

    def __str__(self) -> str:
        """What is asked for, in words."""
        if self.label:
            return self.label
        parts = [
            f"{100 * self.fraction:.3g} %" + " of the prompt" * self.of_prompt if self.fraction else "",
            f"{self.tokens}" * bool(self.tokens),
        ]
        return " or ".join(part for part in parts if part)


def everything(rows: DecodeRows) -> Choice:
    """Dense attention: nothing to choose."""
    kept = rows.visible.expand(rows.num_kv_heads, -1, -1)
    return rows.chosen(kept, rows.num_visible, retrieved=False)

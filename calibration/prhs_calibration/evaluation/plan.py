"""What an evaluation runs: tasks, lengths, selectors, budgets."""

from __future__ import annotations

import dataclasses
from typing import Literal

from prhs_calibration.evaluation import points
from prhs_calibration.evaluation.comparison import BUDGETS
from prhs_calibration.evaluation.points import DEFAULTS, DENSE, PREHOC
from prhs_calibration.evaluation.tasks import TASKS
from prhs_kernels.errors import UsageError

LENGTHS = (2048, 4096)  # tokens, as far as the model's context allows
ITEMS = 1_000_000  # item numbers of one seed; those used for matching are the last ones


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run. `budgets` are attended fractions; `delta` adds PrHS at the dial that promises it.

    published: also every comparison method at the budgets of its publication.
    backend: of dense attention and PrHS in the built-in tasks; other methods run on the reference.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    selectors: tuple[str, ...] = (DENSE, *DEFAULTS)
    budgets: tuple[float, ...] = BUDGETS
    samples: int = 16  # per task and length
    templates: Literal["seen", "unseen"] = "seen"
    delta: float | None = None
    seed: int = 0
    confidence: float = 0.95
    public: tuple[str, ...] = ()  # tasks of lm-evaluation-harness
    task_path: str | None = None  # folder with more task files for it
    published: bool = False
    backend: Literal["auto", "reference", "triton"] = "auto"

    def __post_init__(self) -> None:
        points.check_selectors(self.selectors)
        points.check_budgets(self.budgets)
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise UsageError(f"task {unknown[0]!r}: choose from {', '.join(TASKS)}")
        if not 0 < self.samples <= ITEMS // 2:
            raise UsageError(f"samples = {self.samples} must be in [1, {ITEMS // 2}]")
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence {self.confidence} must be in (0, 1)")
        asked = self.budgets or self.delta is not None or self.published
        if not asked and set(self.selectors) != {DENSE}:
            raise UsageError("no budget and no delta: give at least one for selectors other than dense")

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Task and length of every table."""
        return [(task, length) for length in self.lengths for task in self.tasks]

    @property
    def needs_bundle(self) -> bool:
        return PREHOC in self.selectors

    def for_context(self, context_length: int) -> Plan:
        """Without lengths: those of `LENGTHS` that fit in `context_length` tokens, else all of it."""
        fitting = tuple(length for length in LENGTHS if length <= context_length)
        return dataclasses.replace(self, lengths=self.lengths or fitting or (context_length,))

"""Public benchmarks through lm-evaluation-harness: its tasks and metrics, our attention and decode loop.

Nothing of the harness is patched: `simple_evaluate` gets an `LM` (`harness_model.PrhsLM`) and its own task
objects. The harness is the extra `eval`; without it this module still imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prhs_calibration.evaluation import closed_loop, harness_rows, points, rows
from prhs_calibration.evaluation.closed_loop import Steps
from prhs_calibration.evaluation.points import Point
from prhs_calibration.evaluation.tasks import TASKS
from prhs_calibration.files import one_line
from prhs_kernels.errors import InputError, PrhsError, UsageError
from prhs_kernels.selectors.baselines import Baseline

if TYPE_CHECKING:
    from prhs_calibration.bundle import Bundle
    from prhs_calibration.evaluation.plan import Plan
    from prhs_calibration.evaluation.store import Store
    from prhs_calibration.models import LoadedModel

MATCHING_CONTEXTS = 4  # per task, on which the dial of a budget is found
MATCHING_STEPS = 8  # of their last tokens, run as decode steps

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """Tasks of the harness with their data, and the manager that made them."""

    tasks: tuple[Any, ...] = ()
    manager: Any = None

    @property
    def names(self) -> list[str]:
        return [str(task.task_name) for task in self.tasks]


def require(names: Sequence[str]) -> None:
    """UsageError when there are tasks that are not built in and the harness is not installed."""
    if names and importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"task {names[0]!r} is not built in as {', '.join(TASKS)} are, and for public benchmarks the "
            "extra 'eval' (lm-evaluation-harness) is missing: pip install 'prhs[eval]'"
        )


def evaluate(
    loaded: LoadedModel,
    bundle: Bundle | None,
    plan: Plan,
    benchmarks: Benchmarks,
    methods: Mapping[str, Baseline],
    store: Store,
    report: Progress,
) -> list[dict[str, Any]]:
    """Rows of what `load` gave: every metric that the harness reports x every point of the plan.

    `plan.samples` is the harness's `limit` of documents per task; the dial of a budget is found per task, on
    contexts of its first documents. Answers are kept in `store` one by one.

    Raises:
        InputError: the harness failed on a task; PrHS never reused a set on one.
    """
    from prhs_calibration.evaluation.harness_model import PrhsLM

    if not benchmarks.tasks:
        return []
    runs: dict[str, list[harness_rows.Run]] = {name: [] for name in benchmarks.names}
    for by_task in _points(loaded, bundle, plan, benchmarks, methods, store, report):
        model = PrhsLM(loaded, by_task, store=store, seed=plan.seed, report=report)
        result = _simple_evaluate(model, benchmarks, plan.samples, plan.seed)
        for name, point in by_task.items():
            rows.check_reuse(point, model.stats[name], name)
            runs[name].append((point, model.stats[name], result))
    return [row for name, of_task in runs.items() for row in harness_rows.rows_of(name, of_task, plan)]


def load(loaded: LoadedModel, plan: Plan, report: Progress) -> Benchmarks:
    """Tasks of the harness for `plan.public`, with their data; the members of groups one by one.

    Raises:
        UsageError: the extra is missing, or the harness has no such task.
        InputError: the data of a task cannot be had.
    """
    if not plan.public:
        return Benchmarks()
    require(plan.public)
    if plan.task_path is not None and not Path(plan.task_path).is_dir():
        raise InputError(f"task path {plan.task_path} is not a folder; give the one with the YAML files")
    found: dict[str, Any] = {}
    with _muted():
        manager = _manager(loaded, plan)
        for done, name in enumerate(plan.public):
            report("loading benchmarks", done, len(plan.public))
            if name not in manager.all_tasks:
                raise UsageError(
                    f"task {name!r} is not known to lm-evaluation-harness, and built in are only "
                    f"{', '.join(TASKS)}; a folder with more task files is given by --task-path"
                )
            try:
                found |= manager.load([name])["tasks"]
            except Exception as error:  # whatever datasets, the hub or the task's own code raises
                raise InputError(
                    f"the data of task {name!r} cannot be had ({type(error).__name__}: {one_line(error)}); "
                    "go online once, or give a task file with local data by --task-path"
                ) from error
    report("loading benchmarks", len(plan.public), len(plan.public))
    return Benchmarks(tuple(found.values()), manager)


def _manager(loaded: LoadedModel, plan: Plan) -> Any:
    from lm_eval.tasks import TaskManager

    # tasks that make their own data (RULER) size it with these
    metadata = {"tokenizer": loaded.tokenizer.name_or_path, "max_seq_lengths": list(plan.lengths)}
    if plan.task_path is not None:  # reading the harness's own thousands of files takes seconds
        manager = TaskManager(include_path=plan.task_path, include_defaults=False, metadata=metadata)
        if set(plan.public) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=plan.task_path, metadata=metadata)


def _points(
    loaded: LoadedModel,
    bundle: Bundle | None,
    plan: Plan,
    benchmarks: Benchmarks,
    methods: Mapping[str, Baseline],
    store: Store,
    report: Progress,
) -> list[dict[str, Point]]:
    """For every row of a table its point by task, at the dial that spends the budget on the task."""
    contexts = functools.cache(lambda: _contexts(loaded, plan, benchmarks))
    found = []
    for done, name in enumerate(benchmarks.names):
        report("matching benchmarks", done, len(benchmarks.names))
        matches = closed_loop.find_matches(
            loaded.model,
            bundle,
            plan.selectors,
            plan.budgets,
            functools.partial(lambda task: contexts()[task], name),
            store,
            f"dials/{name}",
            methods,
        )
        found.append(
            points.points(
                loaded.model.config,
                bundle,
                plan.selectors,
                plan.budgets,
                matches,
                plan.delta,
                published=plan.published,
                methods=methods,
            )
        )
    report("matching benchmarks", len(found), len(found))
    return [dict(zip(benchmarks.names, row, strict=True)) for row in zip(*found, strict=True)]


def _contexts(loaded: LoadedModel, plan: Plan, benchmarks: Benchmarks) -> dict[str, list[Steps]]:
    """Some contexts of each task, their last tokens as decode steps, or texts that are scored as a whole."""
    from prhs_calibration.evaluation.harness_model import Recorder

    recorder = Recorder()
    _simple_evaluate(recorder, benchmarks, MATCHING_CONTEXTS, plan.seed)
    found: dict[str, list[Steps]] = {name: [] for name in benchmarks.names}
    for name, text, whole in dict.fromkeys(recorder.seen):
        tokens = list(loaded.tokenizer(text, verbose=False).input_ids)[-loaded.context_length :]
        if len(tokens) > 1 and len(found[name]) < MATCHING_CONTEXTS:
            prefill = 1 if whole else max(len(tokens) // 2, len(tokens) - MATCHING_STEPS)
            found[name].append((tokens, prefill))
    empty = [name for name, prompts in found.items() if not prompts]
    if empty:
        raise InputError(f"task {empty[0]!r} has no context to match budgets on; use --delta instead")
    return found


def _simple_evaluate(model: Any, benchmarks: Benchmarks, limit: int, seed: int) -> dict[str, Any]:
    """The harness's own loop; its errors become one line."""
    import lm_eval

    try:
        with _muted():
            result = lm_eval.simple_evaluate(
                model=model,
                tasks=list(benchmarks.tasks),
                task_manager=benchmarks.manager,
                limit=limit,
                bootstrap_iters=0,  # the intervals are ours: paired
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (PrhsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"lm-evaluation-harness failed on {', '.join(benchmarks.names)}: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    assert isinstance(result, dict)  # None comes on ranks other than the first
    return result


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """The harness draws bars and gives advice; progress is the caller's to show (see `aloud`)."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(disabled)


def aloud(report: Progress) -> Progress:
    """The same callback, heard also where the harness is muted."""
    stderr = sys.stderr

    def told(stage: str, done: int, total: int) -> None:
        with contextlib.redirect_stderr(stderr):
            report(stage, done, total)

    return told

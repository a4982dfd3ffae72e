"""Accuracy: selectors x budgets x lengths x tasks, in closed loop, every scored token a decode step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prhs_calibration import results
from prhs_calibration.evaluation import closed_loop, lm_harness, points, rows
from prhs_calibration.evaluation.bootstrap import RESAMPLES, PairedBootstrap
from prhs_calibration.evaluation.closed_loop import Steps
from prhs_calibration.evaluation.fitting import fitted
from prhs_calibration.evaluation.plan import ITEMS, Plan
from prhs_calibration.evaluation.points import Matches, Point
from prhs_calibration.evaluation.store import Store
from prhs_calibration.evaluation.tasks import TASKS, Example
from prhs_kernels.errors import UsageError
from prhs_kernels.runtime.scoring import ScoringResult
from prhs_kernels.selectors.baselines import Baseline

if TYPE_CHECKING:
    from prhs_calibration.bundle import Bundle
    from prhs_calibration.models import LoadedModel
    from prhs_kernels.ops.backend import Backend

KIND = "evaluate"
MATCHING_ITEMS = 2  # per task and length, on which the dial of a budget is found; never scored

Progress = Callable[[str, int, int], None]


def split_tasks(names: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Built-in tasks and those for lm-evaluation-harness; None is every built-in one.

    Raises:
        UsageError: no task, or one that is not built in while the harness is not installed.
    """
    if names is None:
        return tuple(TASKS), ()
    if not names:
        raise UsageError(f"no task: choose from {', '.join(TASKS)}, or name a public benchmark")
    names = list(dict.fromkeys(names))
    public = tuple(name for name in names if name not in TASKS)
    lm_harness.require(public)
    return tuple(name for name in names if name in TASKS), public


def open_store(loaded: LoadedModel, bundle: Bundle | None, plan: Plan, **more: Any) -> Store:
    """Where this run keeps what is done: one file per model, bundle, plan, versions and `more`.

    Raises:
        UsageError: a length that the model or a task cannot have, found before anything is run.
    """
    longest = max(plan.lengths, default=0)
    if longest > loaded.context_length:
        raise UsageError(
            f"length {longest} is beyond the context of {loaded.model_id}, {loaded.context_length} tokens; "
            "give smaller lengths"
        )
    conditions = {
        "plan": dataclasses.asdict(plan),
        "items": hashlib.sha256(
            repr([_item(loaded, plan, *cell, 0).input_ids for cell in plan.cells]).encode()
        ).hexdigest(),
        "weights": loaded.weights_hash,
        "tokenizer": loaded.tokenizer_hash,
        "bundle": None if bundle is None else _digest(bundle),
        "device": loaded.device.type,
        "dtype": str(loaded.dtype),
        "versions": results.conditions()["versions"],
    }
    return Store.for_conditions(conditions | more)


def evaluate(
    loaded: LoadedModel,
    bundle: Bundle | None,
    plan: Plan,
    store: Store,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the plan, or what of it `store` lacks; returns the `data` of a result file.

    Args:
        bundle: needed when PrHS is among the selectors.
        store: from `open_store`; holds every finished item, also when this is interrupted.
        progress: called as `progress(stage, done, total)`.

    Raises:
        InputError: the bundle is another model's; data of a public task cannot be had; PrHS never reused a
            set on a task.
        UsageError: PrHS without a bundle, or a δ its dial does not have; an unknown public task.
    """
    if plan.needs_bundle:
        if bundle is None:
            raise UsageError("selector 'prhs' needs a bundle: calibrate this model first")
        bundle.check_model(loaded.fingerprint, loaded.weights_hash)
    report = lm_harness.aloud(progress or (lambda stage, done, total: None))
    public = lm_harness.load(loaded, plan, report)  # first: what cannot be had shall not cost hours
    longest = max(plan.lengths, default=loaded.context_length)
    methods = fitted(loaded, plan.selectors, context_length=longest, seed=plan.seed, progress=report)
    with store.saving():
        matches = _match(loaded, bundle, plan, methods, store, report)
        table: list[dict[str, Any]] = []
        samples: dict[str, Any] = {}
        for number, (task, length) in enumerate(plan.cells):
            run = points.points(
                loaded.model.config,
                bundle,
                plan.selectors,
                plan.budgets,
                matches[number],
                plan.delta,
                published=plan.published,
                methods=methods,
            )
            outcomes = _outcomes(loaded, plan, store, task, length, run, report)
            bootstrap = PairedBootstrap(plan.samples, seed=(plan.seed, zlib.crc32(task.encode()), length))
            cell = rows.Cell(task, TASKS[task].metric, length, bootstrap, plan.confidence)
            for row, figures in cell.rows(run, outcomes):
                table.append(row)
                samples[f"{task}/{length}/{row['point']}"] = figures
        table += lm_harness.evaluate(loaded, bundle, plan, public, methods, store, report)
    means = rows.averages(table, samples, plan.confidence)
    return {
        "loop": "closed; every scored token is a decode step, teacher forced in the built-in tasks",
        "interval": f"paired percentile bootstrap over examples, {plan.confidence:g}, {RESAMPLES} resamples; "
        "the exact binomial bound where all examples agree",
        **dataclasses.asdict(plan),
        "descriptions": {task: TASKS[task].description for task in plan.tasks},
        "rows": table,
        "averages": means,
        "equal_bytes": rows.at_equal_bytes(means),
    }


def _item(loaded: LoadedModel, plan: Plan, task: str, length: int, number: int) -> Example:
    seed = plan.seed * ITEMS + number
    try:
        return TASKS[task].build(loaded.tokenizer, length=length, seed=seed, templates=plan.templates)
    except UsageError as error:
        raise UsageError(f"task {task}: {error}") from error


def steps_of(example: Example, *, question_known: bool = False) -> Steps:
    """Tokens to run: the last answer token is only predicted, and what predicts the first is a step.

    question_known: the question belongs to the prefill, up to its last token.
    """
    asked = len(example.context_ids) + len(example.question_ids)
    return example.input_ids[:-1], asked - 1 if question_known else min(len(example.context_ids), asked - 1)


def _match(
    loaded: LoadedModel,
    bundle: Bundle | None,
    plan: Plan,
    methods: Mapping[str, Baseline],
    store: Store,
    report: Progress,
) -> list[Matches]:
    """For every cell the dials that spend the budgets."""
    if not plan.budgets or not (plan.needs_bundle or points.searched(plan.selectors)):
        return [{} for _ in plan.cells]
    found: list[Matches] = []

    def prompts(task: str, length: int) -> list[Steps]:
        items = range(ITEMS - MATCHING_ITEMS, ITEMS)
        return [steps_of(_item(loaded, plan, task, length, item)) for item in items]

    for number, cell in enumerate(plan.cells):
        report("matching budgets", number, len(plan.cells))
        name = "dials/{}/{}".format(*cell)
        some = functools.partial(prompts, *cell)
        found.append(
            closed_loop.find_matches(
                loaded.model, bundle, plan.selectors, plan.budgets, some, store, name, methods, plan.backend
            )
        )
    report("matching budgets", len(plan.cells), len(plan.cells))
    return found


def _outcomes(
    loaded: LoadedModel,
    plan: Plan,
    store: Store,
    task: str,
    length: int,
    run: Sequence[Point],
    report: Progress,
) -> list[dict[str, Any]]:
    """Per item, the outcome at every point by its name."""
    found = []
    total = len(plan.cells) * plan.samples
    before = plan.cells.index((task, length)) * plan.samples
    for number in range(plan.samples):
        report("evaluating", before + number, total)
        name = f"items/{task}/{length}/{number}"
        outcome = store.get(name)
        if outcome is None:
            example = _item(loaded, plan, task, length, number)
            outcome = store.put(name, dict(_run(loaded, example, run, plan.backend)))
        found.append(outcome)
    report("evaluating", before + plan.samples, total)
    return found


def _run(
    loaded: LoadedModel, example: Example, run: Sequence[Point], backend: Backend
) -> Iterator[tuple[str, dict[str, Any]]]:
    for known in (False, True):
        some = [point for point in run if point.question_known == known]
        if some:
            steps = steps_of(example, question_known=known)
            for point, result in closed_loop.run_points(loaded.model, steps, some, backend):
                yield point.name, outcome_of(result, example.answer_ids)


def outcome_of(result: ScoringResult, answer_ids: Sequence[int]) -> dict[str, Any]:
    """What an item's last predictions say of its answer, JSON-able.

    `correct`: every answer token is the argmax given those before it, which is what greedy decoding writes;
    `nats`: minus the log-likelihood of the answer, over `tokens`; `stats`: sums of `DecodeStats`.
    """
    logits = result.logits[-len(answer_ids) :].float()
    answer = logits.new_tensor(list(answer_ids)).long()
    likelihood = logits.log_softmax(-1).gather(-1, answer[:, None])
    return {
        "correct": bool((logits.argmax(-1) == answer).all()),
        "nats": -float(likelihood.double().sum()),
        "tokens": len(answer_ids),
        "stats": rows.sums(result.stats),
        "backend": result.backend,
    }


def _digest(bundle: Bundle) -> str:
    digest = hashlib.sha256(bundle.metadata.to_json().encode())
    for name in sorted(bundle.tensors):
        tensor = bundle.tensors[name].contiguous()
        digest.update(name.encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()

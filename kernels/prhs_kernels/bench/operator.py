"""`prhs bench operator`: one layer's decode step and its parts, against every dense rival."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prhs_kernels.bench import timing
from prhs_kernels.bench.cases import Case, Inputs, Problem, Row, run, sparse_cases
from prhs_kernels.bench.dense_cases import dense_cases, slow_to_start_cases
from prhs_kernels.bench.peers import peer_cases
from prhs_kernels.bench.report import derive, tables
from prhs_kernels.bench.retrieval_cases import layer_cases, stage_cases
from prhs_kernels.bench.session import Record, Session, free_bytes
from prhs_kernels.bench.shapes import TOY, Point, check_ratios, find
from prhs_kernels.bench.tuning_cases import tuning_cases
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind

__all__ = ["RATIOS", "Plan", "cost", "default_points", "derive", "measure", "tables", "toy_points"]

RATIOS = (0.0, 1 / 20, 1 / 8, 1.0)  # of the rows that retrieve
CASE_SECONDS, SLOW_SECONDS = 1.5, 20.0  # to compile and check a case; one that torch compiles

Group = Callable[[Inputs], Iterator[Case]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure: every point with every retrieval ratio and kind of scanned keys. `tune`: other launch
    shapes as well."""

    points: tuple[Point, ...]
    ratios: tuple[float, ...]
    tune: bool = False
    key_copies: tuple[KeyCopyKind, ...] = (KeyCopyKind.EXACT,)

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    @property
    def problems(self) -> list[Problem]:
        return [Problem.of(point) for point in self.points]


def default_points() -> tuple[Point, ...]:
    """What the targets are about, most important first; the second is the paper's point."""
    llama, paper = find("llama-3-8b"), find("llama-2-7b")
    return (
        Point(llama, 8, 32768, 1024),
        Point(paper, 16, 2048, 256),
        Point(llama, 8, 16384, 1024),
        Point(llama, 8, 4096, 1024),
    )


def toy_points() -> tuple[Point, ...]:
    """For the interpreter, where a real size would take days."""
    return (Point(TOY, 1, 96, 60),)


def passes(plan: Plan) -> list[Group]:
    """Groups of cases; every problem has had one before the next begins."""

    def main(inputs: Inputs) -> Iterator[Case]:
        yield from sparse_cases(inputs)
        yield from dense_cases(inputs)
        yield from layer_cases(inputs, plan.ratios, plan.key_copies)
        yield from stage_cases(inputs)

    return [main, peer_cases, slow_to_start_cases, *([tuning_cases] if plan.tune else [])]


def measure(plan: Plan, session: Session, device: str, dtype: torch.dtype) -> bool:
    """Run what the session does not have yet; False if it ran out of time before the end."""
    rate = timing.copy_bytes(device) / timing.copy_time(device).p50
    work = [(group, problem) for group in passes(plan) for problem in plan.problems]
    counts = [sum(1 for _ in group(Inputs(problem, dtype, device))) for group, problem in work]
    for place, (group, problem) in enumerate(work):
        for done, row in enumerate(_rows(group, Inputs(problem, dtype, device), session, device), 1):
            session.progress("bench operator", sum(counts[:place]) + done, sum(counts))
            if row is not None:
                session.keep({**row, "copy_rate": rate})
            elif session.out_of_time():
                return False
        gc.collect()  # tensors of this problem, before those of the next
    return True


def _rows(group: Group, inputs: Inputs, session: Session, device: str) -> Iterator[Record | None]:
    """A row per case that was run, None for one that was not: it is finished, or time is up."""
    for case in group(inputs):
        key = case.key(inputs.problem)
        if session.has(key) or session.out_of_time():
            yield None
        else:
            row = _short_of_memory(case, inputs, device) or run(case, inputs.problem, device, needs(inputs))
            yield {"key": key, **dataclasses.asdict(row)}


def _short_of_memory(case: Case, inputs: Inputs, device: str) -> Row | None:
    """A row that says how much was needed, where it is clear beforehand that memory does not do."""
    free = free_bytes(device)
    if free is None or "keys" in vars(inputs) or inputs.num_bytes <= free:
        return None
    error = f"{needs(inputs)}, {free / 2**30:.1f} GiB are free"
    return Row(inputs.problem, case.name, case.kind, case.num_bytes, status="out of memory", error=error)


def needs(inputs: Inputs) -> str:
    return f"needs about {inputs.num_bytes / 2**30:.1f} GiB"


def cost(plan: Plan, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Estimate per problem, without touching a device: cases, seconds, peak GiB."""
    rows = []
    for problem in plan.problems:
        inputs = Inputs(problem, dtype, "cuda")
        seconds, count = 0.0, 0
        for group in passes(dataclasses.replace(plan, tune=False)):
            for case in group(inputs):
                calls = timing.CALLS * (timing.REPLAYS + 4)
                start = SLOW_SECONDS if group is slow_to_start_cases else CASE_SECONDS
                seconds += calls * case.num_bytes / timing.ASSUMED_RATE + start
                count += 1
        memory = inputs.num_bytes / 2**30
        rows.append({"problem": str(problem), "cases": count, "seconds": seconds, "gib": memory})
    return rows

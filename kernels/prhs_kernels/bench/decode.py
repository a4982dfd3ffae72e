"""`prhs bench decode`: whole decode steps of random models, sparse at each retrieval ratio against dense."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch

from prhs_kernels.bench import timing
from prhs_kernels.bench.cases import Problem, Row, failure
from prhs_kernels.bench.decode_cases import ROOM, Subject, cases
from prhs_kernels.bench.models import random_model
from prhs_kernels.bench.report import Table, derive, fastest_dense, notes, place, ratio
from prhs_kernels.bench.session import Record, Session, free_bytes
from prhs_kernels.bench.shapes import TOY, Point, check_ratios, find
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind

__all__ = ["RATIOS", "Plan", "cost", "default_points", "derive", "measure", "tables", "toy_points"]

RATIOS = (0.0, 1 / 20, 1 / 8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every point with every retrieval ratio and every kind of scanned keys, and the dense rivals of every
    point."""

    points: tuple[Point, ...]
    ratios: tuple[float, ...]
    key_copies: tuple[KeyCopyKind, ...] = (KeyCopyKind.EXACT,)

    def __post_init__(self) -> None:
        check_ratios(self.ratios)


def default_points() -> tuple[Point, ...]:
    """The points of the targets; the first is the paper's."""
    return (
        Point(find("llama-2-7b"), 16, 4096, 512),
        Point(find("llama-3-8b"), 16, 32768, 1024),
    )


def toy_points() -> tuple[Point, ...]:
    return (Point(TOY, 2, 96, 60),)


def measure(plan: Plan, session: Session, device: str, dtype: torch.dtype) -> bool:
    """Run what the session does not have yet; False if it ran out of time before the end."""
    rate = timing.copy_bytes(device) / timing.copy_time(device).p50
    work = [(point, case) for point in plan.points for case in cases(point, plan.ratios, plan.key_copies)]
    subject: Subject | None = None
    for done, (point, case) in enumerate(work):
        problem = Problem.of(point)
        key = f"{problem} | {case.name}"
        if session.has(key):
            continue
        if session.out_of_time():
            return False
        session.progress("bench decode", done, len(work))
        row = Row(problem, case.name, case.kind, 0)
        try:
            if subject is None or subject.point != point:
                subject = None  # its memory is needed
                subject = _subject(point, dtype, device)
            spent, num_bytes, values = case.run(subject)
            row = dataclasses.replace(row, timing=spent, num_bytes=int(num_bytes), values=values)
        except Exception as error:  # the report says what failed
            row = failure(row, error, f"needs about {_gib(point, dtype):.0f} GiB")
        session.keep({"key": key, **dataclasses.asdict(row), "copy_rate": rate})
        gc.collect()
    session.progress("bench decode", len(work), len(work))
    return True


def _subject(point: Point, dtype: torch.dtype, device: str) -> Subject:
    """The point's model, if it and its cache fit."""
    gc.collect()
    free = free_bytes(device)
    if free is not None and _gib(point, dtype) * 2**30 > free:
        raise torch.cuda.OutOfMemoryError(f"{free / 2**30:.1f} GiB are free")
    model = random_model(point.shape, point.context + ROOM, dtype, device)
    return Subject(model, point, dtype, device)


def _gib(point: Point, dtype: torch.dtype) -> float:
    """Weights, cache and what a step needs besides."""
    shape = point.shape
    kv = shape.kv_bytes(point.batch, point.context + ROOM, dtype.itemsize)
    repeated = 2 * kv * shape.group // shape.num_layers
    return (shape.num_parameters * dtype.itemsize + kv + repeated) / 2**30


COLUMNS = (
    "case", "tok/s", "ms", "p20 .. p80", "floor", "x dense", "x gpt-fast", "ρ", "attended", "read GB",
    "held GB",
)  # fmt: skip


def tables(rows: Sequence[Record], device: str) -> list[Table]:
    """One table per point; `floor`: time of (weights + KV bytes read) at copy
    bandwidth over the time."""
    derived = derive(rows, device)
    dense = fastest_dense(rows, device)
    points: dict[str, list[Record]] = {}
    for row in derived:
        points.setdefault(str(Problem(**row["problem"])), []).append(row)
    found = []
    for title, group in points.items():
        steps = [row for row in group if row["timing"] and row["kind"] != "stage"]
        lines = notes(group, dense.get(place(group[0])))
        lines += [
            f"{row['case']}: {row['timing']['p50'] / 1e3:.1f} ms"
            for row in group
            if row["timing"] and row["kind"] == "stage"
        ]
        lines += [
            f"{row['case']}: longest step {row['values']['longest_step_us'] / 1e3:.2f} ms"
            for row in steps
            if "longest_step_us" in row["values"]
        ]
        found.append(Table(title, COLUMNS, [_cells(row) for row in steps], lines))
    return found


def _cells(row: Record) -> list[Any]:
    spent, values = row["timing"], row["values"]
    dense = row["kind"] != "sparse"
    return [
        row["case"], f"{values['tokens_per_s']:.0f}", f"{spent['p50'] / 1e3:.2f}",
        f"{spent['p20'] / 1e3:.2f} .. {spent['p80'] / 1e3:.2f}", f"{100 * row['floor_fraction']:.0f} %",
        ratio(row["over_dense"], row["claimed"]), ratio(row["over_masked"], True),
        None if dense else f"{values['retrieval_ratio']:.3f}", f"{values['attended_fraction']:.3f}",
        f"{values['kv_read_bytes'] / 1e9:.2f}", f"{values['kv_resident_bytes'] / 1e9:.2f}",
    ]  # fmt: skip


def cost(plan: Plan, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Estimate per point, without touching a device: cases, seconds, peak GiB."""
    found = []
    for point in plan.points:
        shape, count = point.shape, len(list(cases(point, plan.ratios, plan.key_copies)))
        read = shape.parameters_read * dtype.itemsize
        read += shape.kv_bytes(point.batch, point.context, dtype.itemsize)
        # building, checking and capturing take seconds, ROOM steps at most; first token: about 400 TFLOP/s
        flops = 2 * shape.parameters_read * point.context
        flops += 2 * shape.num_layers * shape.num_qo_heads * shape.head_dim * point.context**2
        seconds = 10 + count * (5 + ROOM * read / timing.ASSUMED_RATE) + 3 * flops / 4e14
        found.append(
            {"point": str(Problem.of(point)), "cases": count, "seconds": seconds, "gib": _gib(point, dtype)}
        )
    return found

"""`prhs bench prefill`: attention of one layer under PSAW's window, whole prompts with PSAW and with ETF."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prhs_kernels.bench import prefill_model
from prhs_kernels.bench.prefill_cases import PrefillProblem, prefill_rows
from prhs_kernels.bench.report import Table
from prhs_kernels.bench.session import Record, Session
from prhs_kernels.bench.shapes import TOY, Point, find
from prhs_kernels.errors import UsageError

__all__ = ["RATIOS", "Plan", "cost", "default_points", "derive", "measure", "tables", "toy_points"]

RATIOS = (0.25, 0.5, 0.75)  # of the oldest positions, or of the prompt's first tokens
FLOPS = 4e14  # per second, for the estimate of a dry run
CASE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every point with every fraction: what PSAW releases (one layer: there; a model: in its last layer), and
    what ETF freezes in the last layer."""

    points: tuple[Point, ...]
    fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        for fraction in self.fractions:
            if not 0 < fraction < 1:
                raise UsageError(f"fraction {fraction:g} is not between 0 and 1 (both excluded)")


def default_points() -> tuple[Point, ...]:
    """`kept` has no meaning here."""
    return (
        Point(find("llama-2-7b"), 1, 4096, 0),
        Point(find("llama-3-8b"), 1, 8192, 0),
        Point(find("llama-3-8b"), 1, 32768, 0),
    )


def toy_points() -> tuple[Point, ...]:
    return (Point(TOY, 1, 200, 0),)


def measure(plan: Plan, session: Session, device: str, dtype: torch.dtype) -> bool:
    """Run what the session does not have yet; False if it ran out of time before the end."""
    for done, point in enumerate(plan.points):
        for rows in (
            _attention(plan, session, point, device, dtype),
            _models(plan, session, point, device, dtype),
        ):
            for row in rows:
                session.progress("bench prefill", done, len(plan.points))
                session.keep(row)
                if session.out_of_time():
                    return False
        gc.collect()
    session.progress("bench prefill", len(plan.points), len(plan.points))
    return True


def _attention(
    plan: Plan, session: Session, point: Point, device: str, dtype: torch.dtype
) -> Iterator[Record]:
    shape = point.shape
    heads = shape.num_qo_heads, shape.num_kv_heads
    problem = PrefillProblem(shape.name, point.batch, point.context, *heads, shape.head_dim)
    for row in prefill_rows(problem, device, dtype, (0.0, *plan.fractions), skip=session.has):
        yield row | {"kind": "attention", "status": status(row["error"])}


def _models(plan: Plan, session: Session, point: Point, device: str, dtype: torch.dtype) -> Iterator[Record]:
    for case in prefill_model.cases(point, plan.fractions):
        if not session.has(case.key):
            row = prefill_model.run(case, device, dtype)
            yield row | {"kind": "model", "status": status(row["error"])}
    prefill_model.forget()


def status(error: str) -> str:
    """As of other benchmarks' rows."""
    if "OutOfMemoryError" in error:
        return "out of memory"
    return "wrong" if error.startswith("wrong") else "failed" if error else "ok"


def derive(rows: Sequence[Record], device: str) -> list[Record]:
    """The rows with `over_full`: the fastest full attention, or the full model, over the time of the row."""
    full: dict[str, float] = {}
    for row in rows:
        if row["timing"] and row["fraction"] == 0:
            spent = row["timing"]["p50"]
            full[_place(row)] = min(full.get(_place(row), spent), spent)
    return [row | {"over_full": _over(full.get(_place(row)), row)} for row in rows]


def _over(full: float | None, row: Record) -> float | None:
    return full / row["timing"]["p50"] if full and row["timing"] else None


def _place(row: Record) -> str:
    return f"{PrefillProblem(**row['problem'])}, {TITLES[row['kind']]}"


TITLES = {"attention": "attention of one layer", "model": "whole model, to the first logits"}
COLUMNS = ("case", "dropped", "ms", "p20 .. p80", "TFLOP/s", "attention FLOPs saved", "all saved", "x full")


def tables(rows: Sequence[Record], device: str) -> list[Table]:
    """Per point one table for attention and one for the model."""
    groups: dict[str, list[Record]] = {}
    for row in derive(rows, device):
        groups.setdefault(_place(row), []).append(row)
    return [
        Table(title, COLUMNS, [_cells(row) for row in group if row["timing"]], _failures(group))
        for title, group in groups.items()
    ]


def _cells(row: Record) -> list[Any]:
    low, middle, high = (row["timing"][p] / 1e3 for p in ("p20", "p50", "p80"))
    whole = row.get("all_flops_saved")
    return [
        row["case"], f"{100 * row['fraction']:.0f} %", f"{middle:.3f}", f"{low:.3f} .. {high:.3f}",
        f"{row['tflops']:.0f}", f"{100 * row['flops_saved']:.1f} %",
        None if whole is None else f"{100 * whole:.1f} %", f"{row['over_full']:.2f}",
    ]  # fmt: skip


def _failures(rows: list[Record]) -> list[str]:
    return [
        f"{row['case']}, {100 * row['fraction']:.0f} %: {row['status']}, {row['error']}"
        for row in rows
        if not row["timing"]
    ]


def cost(plan: Plan, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Estimate per point, without touching a device: cases, seconds, peak GiB."""
    found = []
    for point in plan.points:
        shape = point.shape
        models = prefill_model.cases(point, plan.fractions)
        count = 2 + 2 * (1 + len(plan.fractions)) + len(models)
        flops = sum(case.flops for case in models)
        seconds = count * CASE_SECONDS + prefill_model.REPEATS * 2 * flops / FLOPS
        gib = (shape.num_parameters + 8 * point.batch * point.context * shape.ffn) * dtype.itemsize
        gib += shape.kv_bytes(point.batch, point.context, dtype.itemsize)
        name = f"{shape.name}: batch {point.batch} x {point.context} tokens"
        found.append({"point": name, "cases": count, "seconds": seconds, "gib": gib / 2**30})
    return found

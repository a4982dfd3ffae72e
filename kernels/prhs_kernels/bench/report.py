"""Rows to read: bytes per second, fraction of the byte floor, ratio to dense, and what may be claimed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from prhs_kernels.bench.cases import Problem
from prhs_kernels.bench.dense_cases import AS_GPT_FAST
from prhs_kernels.bench.session import Record

CLAIM = 0.8  # of the copy bandwidth, or of a published rate, that the fastest dense must reach
FA3 = "FlashAttention-3"
# Microseconds by (query heads, KV heads, head_dim, batch, n) in bf16 on an H200; the authors' own runs.
PUBLISHED = {
    (32, 8, 128, 8, 4096): 41.6,
    (32, 8, 128, 8, 16384): 132.7,
    (32, 8, 128, 8, 32768): 253.5,
    (32, 8, 128, 1, 32768): 43.5,
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Plain data for whoever draws it."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Dense:
    """The fastest dense attention of a problem."""

    case: str
    us: float
    copy_fraction: float  # of the bandwidth of a copying kernel
    published: float | None  # us

    @property
    def may_claim(self) -> bool:
        """Whether a ratio to it says anything: it must be about as fast as the memory or the best known."""
        return self.copy_fraction >= CLAIM or (
            self.published is not None and self.published / self.us >= CLAIM
        )


def derive(rows: Sequence[Record], device: str) -> list[Record]:
    """The rows with what follows from them: `tb_per_s`, `floor_us`, `floor_fraction`, `over_dense`,
    `over_masked`, `claimed`, `published_us`; None where something is missing. Times in microseconds."""
    dense, masked = fastest_dense(rows, device), _masked(rows)
    return [row | _figures(row, dense.get(place(row)), masked.get(place(row)), device) for row in rows]


def fastest_dense(rows: Sequence[Record], device: str) -> dict[tuple[Any, ...], Dense]:
    """By `place`, over all unmasked dense rows that were measured."""
    found: dict[tuple[Any, ...], Dense] = {}
    for row in rows:
        if row["kind"] == "dense" and row["timing"]:
            spent = row["timing"]["p50"]
            if place(row) not in found or spent < found[place(row)].us:
                fraction = row["num_bytes"] / row["copy_rate"] / spent
                found[place(row)] = Dense(row["case"], spent, fraction, published(row, device))
    return found


def place(row: Record) -> tuple[Any, ...]:
    """What dense attention depends on."""
    problem = row["problem"]
    sizes = ("num_qo_heads", "num_kv_heads", "head_dim", "batch", "n")
    return tuple(problem[name] for name in sizes)


def published(row: Record, device: str) -> float | None:
    """FlashAttention-3's published time for one layer of this size on this card."""
    layer = "tokens_per_s" not in row["values"]
    return PUBLISHED.get(place(row)) if layer and "H200" in device else None


def _masked(rows: Sequence[Record]) -> dict[tuple[Any, ...], float]:
    measured = [row for row in rows if row["case"] == AS_GPT_FAST and row["timing"]]
    return {place(row): row["timing"]["p50"] for row in measured}


def _figures(row: Record, dense: Dense | None, masked: float | None, device: str) -> Record:
    names = ("tb_per_s", "floor_us", "floor_fraction", "over_dense", "over_masked")
    empty: Record = dict.fromkeys(names) | {"claimed": False, "published_us": published(row, device)}
    if not row["timing"]:
        return empty
    spent, floor = row["timing"]["p50"], row["num_bytes"] / row["copy_rate"]
    whole = row["kind"] != "stage"  # a stage does another work than dense attention
    return empty | {
        "tb_per_s": row["num_bytes"] / spent / 1e6,
        "floor_us": floor,
        "floor_fraction": floor / spent,
        "over_dense": dense.us / spent if dense and whole else None,
        "over_masked": masked / spent if masked and whole else None,
        "claimed": bool(dense and dense.may_claim and whole),
    }


COLUMNS = ("case", "p50 us", "p20 .. p80", "TB/s", "floor us", "of floor", "x dense", "x gpt-fast")


def tables(rows: Sequence[Record], device: str) -> list[Table]:
    """One table per problem, with the dense side and the published time below it."""
    derived = derive(rows, device)
    dense = fastest_dense(rows, device)
    problems: dict[str, list[Record]] = {}
    for row in derived:
        problems.setdefault(str(Problem(**row["problem"])), []).append(row)
    return [
        Table(
            name,
            COLUMNS,
            [_cells(row) for row in group if row["timing"]],
            notes(group, dense.get(place(group[0]))),
        )
        for name, group in problems.items()
    ]


def _cells(row: Record) -> list[Any]:
    spent, fraction = row["timing"], row["floor_fraction"]
    return [
        label(row), f"{spent['p50']:.1f}", f"{spent['p20']:.1f} .. {spent['p80']:.1f}",
        f"{row['tb_per_s']:.2f}", f"{row['floor_us']:.1f}", f"{100 * fraction:.0f} %",
        ratio(row["over_dense"], row["claimed"]), ratio(row["over_masked"], True),
    ]  # fmt: skip


def label(row: Record) -> str:
    """The case; a peer is never the authors' own kernel."""
    return f"{row['case']} (our implementation)" if row["kind"] == "peer" else str(row["case"])


def ratio(value: float | None, claimed: bool) -> str | None:
    """In brackets where it must not be claimed."""
    if value is None:
        return None
    return f"{value:.2f}" if claimed else f"({value:.2f})"


def notes(rows: list[Record], dense: Dense | None) -> list[str]:
    """Failures, remarks, and what the ratios are to."""
    lines = [f"{row['case']}: {row['status']}, {row['error']}" for row in rows if not row["timing"]]
    lines += [f"{row['case']}: {row['note']}" for row in rows if row["timing"] and row["note"]]
    if dense is None:
        return [*lines, "no dense attention was measured: no speed-up to report"]
    text = f"fastest dense: {dense.case}, {dense.us:.1f} us, "
    text += f"{100 * dense.copy_fraction:.0f} % of the copy bandwidth ({rows[0]['copy_rate'] / 1e6:.2f} TB/s)"
    if dense.published is not None:
        text += f"; {FA3} published {dense.published} us"
    lines.append(text)
    if not dense.may_claim:
        lines.append(f"ratios in brackets are no claim: that is below {100 * CLAIM:.0f} %")
    return lines

"""Tables of an accuracy result."""

from __future__ import annotations

from typing import Any

from prhs_cli.output import table

CAPABLE = 0.5  # mean score of dense attention from which a comparison says something


def tables(data: dict[str, Any]) -> list[Any]:
    """One table per task and length, then the means over tasks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        at = f" at {row['length']} tokens" if row["length"] else ""
        groups.setdefault(f"{row['task']}{at}, {row['samples']} items: {row['unit']}", []).append(row)
    for row in data["averages"]:
        if len(row["tasks"]) == 1:  # the mean is the table above
            continue
        title = f"mean of {len(row['tasks'])} tasks at {row['length']} tokens: exact match"
        groups.setdefault(title, []).append(row)
    return [_table(title, rows) for title, rows in groups.items()] + _equal_bytes(data.get("equal_bytes", []))


def doubts(data: dict[str, Any]) -> list[str]:
    """A line where the tasks are too hard for the model: what a selector loses cannot show there."""
    dense = [row["score"]["mean"] for row in data["averages"] if row["selector"] == "dense"]
    if not dense or min(dense) >= CAPABLE:
        return []
    return [
        f"dense attention itself scores {min(dense):.3g} on these tasks, so they show little of what "
        "selectors lose: choose a model that can do them, such as reference-8k, or shorter --lengths"
    ]


def _equal_bytes(entries: list[dict[str, Any]]) -> list[Any]:
    """PrHS beside the others where they read as many bytes; nothing when none of them does."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["others"]))
    if not names:
        return []
    lines = [
        [
            entry["length"] or "-",
            entry["point"],
            entry["kv_bytes_read"],
            f"{entry['score']:.3g}",
            *(f"{entry['others'][name]:.3g}" if name in entry["others"] else "-" for name in names),
        ]
        for entry in entries
    ]
    title = "at equal KV bytes: exact match, others interpolated between their budgets"
    return [table(["length", "point", "KV read", "prhs", *names], lines, title=title)]


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = ["selector", "asked", "score", "minus dense", "kept", "attended", "ρ", "KV read"]
    lines = [
        [
            row["selector"],
            _asked(row),
            _interval(row["score"]),
            _interval(row["difference"]),
            row["effective_budget"],
            row["attended_fraction"],
            row["retrieval_ratio"],
            row["kv_bytes_read"],
        ]
        for row in rows
    ]
    return table(columns, lines, title=title)


def _asked(row: dict[str, Any]) -> str:
    if row["delta"] is not None:
        return f"δ = {row['delta']:g}"
    if row["budget"] is None:
        return row.get("published") or "-"
    return f"{row['budget']:.4g}" + (" (not met)" if row.get("matched") is False else "")


def _interval(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    mean = f"{entry['mean']:.3g}"
    return mean if entry["low"] is None else f"{mean} [{entry['low']:.3g}, {entry['high']:.3g}]"

"""The table and the lines that end `prhs generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prhs_cli.output import table

LABELS = {
    "prompts": "prompts",
    "batches": "batches",
    "prompt_tokens": "prompt tokens",
    "new_tokens": "new tokens",
    "time_to_first_token": "time to first token [s]",
    "tokens_per_second": "tokens per second and sequence",
    "total_tokens_per_second": "tokens per second, all sequences",
    "retrieval_ratio": "retrieval ratio ρ",
    "effective_budget": "effective budget [positions]",
    "attended_fraction": "attended fraction",
    "kv_bytes_read": "KV bytes read, scans included / dense",
    "kv_bytes_resident": "KV bytes resident, largest batch",
    "kv_bytes_resident_dense": "KV bytes resident, dense",
    "audited_dropped_mass": "dropped mass of this run",
    "audited_dropped_mass_lower": "  at least (confidence 0.95 for both)",
    "audited_dropped_mass_upper": "  at most",
    "audited_units": "  units the coin picked",
    "audit_probability": "  its probability",
    "audit_verdict": "  mean of this run against δ",
}
OF_SEVERAL = ("prompts", "batches", "total_tokens_per_second")


def stats_table(summary: Mapping[str, Mapping[str, Any]]) -> Any:
    """One column per variant, one row per figure; of several batches times to the first token are a mean."""
    first = next(iter(summary.values()), {})
    names = [name for name in first if name not in OF_SEVERAL or first["prompts"] > 1]
    rows = [[LABELS.get(name, name), *(summary[variant].get(name) for variant in summary)] for name in names]
    return table(["", *summary], rows)


def audit_line(summary: Mapping[str, Mapping[str, Any]], delta: float) -> str | None:
    """What the audit of a run says about δ; None without one."""
    found = summary.get("sparse", {})
    if "audit_verdict" not in found:
        return None
    mass, lower, upper = (found[f"audited_dropped_mass{end}"] for end in ("", "_lower", "_upper"))
    line = f"dropped mass of this run {mass:.4g}, between {lower:.4g} and {upper:.4g}"
    line += f" ({found['audited_units']:g} units of a coin of {found['audit_probability']:.2g})"
    meaning = {
        "held": f"at most δ = {delta:g}",
        "violated": f"above δ = {delta:g}, which is promised on average over prompts, not of each",
        "undecided": f"undecided against δ = {delta:g}; a larger --audit or more tokens decide more",
    }
    return f"{line}: {meaning[found['audit_verdict']]}"


def agreement_line(answers: Sequence[Mapping[str, Any]]) -> str:
    """Where sparse and dense part, of one prompt or summed over several."""
    same = sum(answer["same_tokens"] for answer in answers)
    longest = sum(max(len(answer[name]["tokens"]) for name in ("sparse", "dense")) for answer in answers)
    if len(answers) != 1:
        equal = sum(answer["sparse"]["tokens"] == answer["dense"]["tokens"] for answer in answers)
        return (
            f"sparse and dense agree on all tokens of {equal} of {len(answers)} prompts, "
            f"and on {same} of {longest} tokens before the first difference of each"
        )
    if answers[0]["sparse"]["tokens"] == answers[0]["dense"]["tokens"]:
        return f"sparse and dense agree on all {same} tokens"
    return f"sparse and dense agree on the first {same} of {longest} tokens"

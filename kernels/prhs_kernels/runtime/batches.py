"""Many prompts through the decode loop: which go together, where each one ends, and what all of them cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from prhs_kernels.errors import UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.auditing import merged
from prhs_kernels.runtime.decode import Generation, generate_tokens
from prhs_kernels.runtime.distributed import merge_run
from prhs_kernels.runtime.stats import DecodeStats


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue: its token ids, and how many tokens may follow."""

    tokens: Sequence[int]
    max_new_tokens: int


def plan_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Indices of the requests, in batches of similar length so that little is padded; the longest first.

    What does not fit into memory then fails at the start and not at the end.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size} must be at least 1")
    order = sorted(
        range(len(requests)), key=lambda i: (-len(requests[i].tokens), -requests[i].max_new_tokens, i)
    )
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_batch(
    model: PreTrainedModel,
    requests: Sequence[Request],
    params: SelectorParams,
    *,
    run: Generation,
    **settings: Any,
) -> Iterator[list[int | None]]:
    """Yield the next token of every request; None once it has stopped or reached its own limit.

    `settings` go to `generate_tokens`; `run` counts what it does, in the end on all ranks together.
    """
    yield from generate_tokens(
        model,
        [request.tokens for request in requests],
        params,
        max_new_tokens=[request.max_new_tokens for request in requests],
        run=run,
        **settings,
    )
    merge_run(model, run)


def summarize(
    runs: Sequence[Generation], made: Sequence[Sequence[int]], delta: float | None = None
) -> dict[str, float | int | str]:
    """What `prhs generate --stats` prints of all batches: sums, or over the batches the mean or largest.

    made: the number of new tokens of every sequence of every batch; the first of each belongs to the prefill.
    delta: what an audit is judged against.
    """
    steps = sum(run.new_tokens - 1 for run in runs)
    seconds = sum(run.decode_seconds for run in runs)
    sequences, tokens = sum(map(len, made)), sum(map(sum, made))
    stats = DecodeStats()
    for run in runs:
        stats = stats.merged(run.stats)
    audits = [run.audit for run in runs if run.audit is not None]
    return {
        "prompts": sequences,
        "batches": len(runs),
        "prompt_tokens": sum(run.prompt_tokens for run in runs),
        "new_tokens": tokens,
        "time_to_first_token": _ratio(sum(run.time_to_first_token for run in runs), len(runs)),
        "tokens_per_second": _ratio(steps, seconds),
        "total_tokens_per_second": _ratio(tokens - sequences, seconds),
        **stats.to_dict(),
        "kv_bytes_resident": max((run.kv_bytes_resident for run in runs), default=0),
        "kv_bytes_resident_dense": max((run.kv_bytes_resident_dense for run in runs), default=0),
        **{name: _words(getattr(run, name) for run in runs) for name in ("mode", "backend", "attention")},
        **(merged(audits).to_dict(delta) if audits else {}),
    }


def _words(values: Iterable[str]) -> str:
    """What the batches had in common, or each of it once."""
    return ", ".join(dict.fromkeys(values))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if numerator > 0 and denominator > 0 else math.nan

"""Continuing prompts: one as a stream, many in batches whose answers are kept as they finish."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prhs_calibration.results import to_json
from prhs_cli import prompting
from prhs_cli.answers import AnswerFile, Screen
from prhs_cli.errors import Interrupted
from prhs_cli.job import Job, width
from prhs_cli.prompt_files import Prompt
from prhs_kernels.errors import PrhsError
from prhs_kernels.runtime.distributed import from_rank_zero

if TYPE_CHECKING:
    from prhs_kernels.runtime.batches import Request


def stream(job: Job, request: Request) -> dict[str, Any]:
    """Continue one prompt with every variant, its text on the screen as it comes."""
    job.room.check(width([request]), 1)
    out, data = job.out, {}
    for name in job.variants:
        if len(job.variants) > 1:
            out.text(f"--- {name} ---\n")
        words = prompting.Detokenizer(job.loaded.tokenizer)
        made: list[list[int]] = []
        try:
            for (token,) in job.steps(name, [request], made, ["1"]):
                assert token is not None  # a single prompt ends the loop when it ends
                out.text(words.add(token))
        except KeyboardInterrupt:
            out.text("\n")  # what is said next begins a line of its own
            raise
        out.text(words.finish() + "\n")
        data[name] = job.answer(request, made[0])
    return {**data, **agreement(data)}


def answer_all(
    job: Job,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    batch_size: int | None,
    file: AnswerFile | None,
) -> list[dict[str, Any]]:
    """Continue many prompts in batches; returns the new answers, in the order of the prompts.

    Those that `file` holds are skipped; it is refused when they were made otherwise.
    """
    out, common = job.out, job.conditions()
    names = [prompt.id for prompt in prompts]
    marks = [_mark(request, common) for request in requests]
    done = set() if file is None else file.finished(dict(zip(names, marks, strict=True)))
    if done:
        out.note(f"{len(done)} of {len(prompts)} prompts are already in {file.path}")  # type: ignore[union-attr]
    todo = [index for index, name in enumerate(names) if name not in done]
    pending = [requests[index] for index in todo]
    sink: AnswerFile | Screen = file or Screen(out, names)
    made: dict[int, dict[str, Any]] = {}

    def keep(position: int, data: dict[str, Any]) -> None:
        index = todo[position]
        request = requests[index]
        facts = {"id": names[index], "request": marks[index], "prompt_tokens": len(request.tokens)}
        made[index] = {**facts, **data, **agreement(data)}
        sink.add(made[index])

    try:
        with out.progress() as progress:
            size = _batch_size(job, pending, batch_size)
            _run_batches(job, pending, [names[index] for index in todo], size, keep, progress)
    except (KeyboardInterrupt, PrhsError) as error:
        if isinstance(sink, Screen):
            sink.flush()
        kept = _kept(len(made) + len(done), len(prompts), file)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted: {kept}") from None
        raise type(error)(f"{error}; {kept}" if made else str(error)) from error
    if file is not None:
        file.sort(names)
    return [made[index] for index in sorted(made)]


def agreement(data: Mapping[str, Any]) -> dict[str, int]:
    """How many first tokens sparse and dense have in common, when both ran."""
    if "dense" not in data:
        return {}
    first, second = data["sparse"]["tokens"], data["dense"]["tokens"]
    pairs = zip(first, second, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return {"same_tokens": same}


def _run_batches(
    job: Job,
    requests: Sequence[Request],
    names: Sequence[str],
    batch_size: int,
    keep: Callable[[int, dict[str, Any]], None],
    progress: Callable[[str, int, int], None],
) -> None:
    """Every batch with every variant; `keep(index, data)` as soon as a prompt has ended in all of them."""
    from prhs_kernels.runtime.batches import plan_batches

    *earlier, last = job.variants
    total = sum(request.max_new_tokens for request in requests) * len(job.variants)
    done = 0
    for batch in plan_batches(requests, batch_size) if requests else []:
        part, own = [requests[index] for index in batch], [names[index] for index in batch]
        before: dict[str, list[list[int]]] = {name: [] for name in job.variants}
        open_rows = set(range(len(batch)))
        for name in (*earlier, last):
            for tokens in job.steps(name, part, before[name], own):
                done += sum(token is not None for token in tokens)
                progress("tokens", done, total)
                if name != last:
                    continue
                for row in [row for row in open_rows if job.ended(part[row], before[last][row])]:
                    open_rows.remove(row)
                    keep(batch[row], {n: job.answer(part[row], before[n][row]) for n in job.variants})
            done += sum(r.max_new_tokens - len(m) for r, m in zip(part, before[name], strict=True))
            progress("tokens", done, total)


DEFAULT_BATCH = 32  # more together would delay the first answers, and an interrupt would cost more


def _batch_size(job: Job, requests: Sequence[Request], asked: int | None) -> int:
    """The asked number of sequences, or what fits; ResourceError when it does not fit."""
    if not requests:
        return 1
    slots = width(requests)
    size = min(len(requests), asked or max(1, min(DEFAULT_BATCH, job.room.batch(slots))))
    size = from_rank_zero(size)  # ranks may see different amounts of free memory
    job.room.check(slots, size)
    return size


def _mark(request: Request, common: Mapping[str, Any]) -> str:
    """What identifies a prompt and everything its answer depends on."""
    content = {"tokens": request.tokens, "max_new_tokens": request.max_new_tokens, **common}
    return hashlib.sha256(to_json(content, indent=None).encode()).hexdigest()[:16]


def _kept(finished: int, total: int, file: AnswerFile | None) -> str:
    if not finished:
        return "no prompt was finished"
    where = "printed above" if file is None else f"in {file.path}, and the same command continues there"
    return f"{finished} of {total} prompts are finished and {where}"

"""Several processes: a model split by heads, or whole models that share the prompts of a calibration.

transformers splits a model; each rank then selects for its own KV heads. The selectors look at one KV head
at a time, so a step needs no collective of ours; the only ones are for reports and for decisions that every
rank must take alike. torch is imported where it is used: the command line asks for its rank before it loads
anything.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from prhs_kernels.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prhs_kernels.params import SelectorParams, TimeParams
    from prhs_kernels.runtime.decode import Generation

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without it."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def launched() -> Ranks:
    """Which rank this process is, if torchrun, or what sets the same variables, started it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if "MASTER_ADDR" not in os.environ or not all(value.isdecimal() for value in values):
        return Ranks()
    return Ranks(*map(int, values))


def check_heads(num_kv_heads: int, size: int, model_id: str) -> None:
    """Refuse a number of ranks that would have to split a KV head."""
    if num_kv_heads % size:
        fitting = ", ".join(str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
        raise UsageError(
            f"{size} ranks cannot share the {num_kv_heads} KV heads of {model_id} evenly; "
            f"use torchrun --nproc-per-node with one of {fitting}"
        )


def num_ranks(model: PreTrainedModel) -> int:
    """Over how many ranks transformers has split the heads of `model`."""
    return int(getattr(model, "tp_size", None) or 1)


def local_params(model: PreTrainedModel, params: SelectorParams) -> SelectorParams:
    """The part of a whole model's parameters that belongs to the KV heads of this rank."""
    size = num_ranks(model)
    if size == 1:
        return params
    import torch.distributed as dist

    heads = params.num_kv_heads // size
    first = dist.get_rank() * heads
    return dataclasses.replace(
        params,
        num_qo_heads=params.num_qo_heads // size,
        num_kv_heads=heads,
        time=None if params.time is None else _heads(params.time, slice(first, first + heads)),
    )


def _heads(time: TimeParams, heads: slice) -> TimeParams:
    fields = {field.name: getattr(time, field.name) for field in dataclasses.fields(time)}
    tables = {name: table[:, heads].contiguous() for name, table in fields.items() if name != "reanchor"}
    return dataclasses.replace(time, **tables)


def merge_run(model: PreTrainedModel, run: Generation) -> None:
    """Make what `run` counted on this rank's heads that of all ranks; every rank must call it."""
    if num_ranks(model) == 1:
        return
    from prhs_kernels.runtime.auditing import merged

    parts = _gathered({f.name: float(getattr(run.stats, f.name)) for f in dataclasses.fields(run.stats)})
    for name in parts[0]:
        setattr(run.stats, name, sum(part[name] for part in parts))
    if run.audit is not None:
        run.audit = merged(_gathered(run.audit))
    sizes = _gathered((run.kv_bytes_resident, run.kv_bytes_resident_dense))
    run.kv_bytes_resident, run.kv_bytes_resident_dense = map(sum, zip(*sizes, strict=True))


def _gathered(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def join() -> None:
    """Make the processes that torchrun started a group, each with a whole model; nothing without torchrun.

    What they exchange are objects of the host, so that it needs no GPU.
    """
    if launched().size > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")


def share(count: int) -> range:
    """Which of `count` pieces of work this process does, when whole models share them."""
    here = launched()
    return range(here.rank, count, here.size)


def combined(parts: Sequence[T]) -> list[T]:
    """The pieces of all processes in their order, from what each made of its `share`; on every rank."""
    size = launched().size
    if size == 1:
        return list(parts)
    found = _gathered(list(parts))
    return [found[index % size][index // size] for index in range(sum(map(len, found)))]


def from_rank_zero(value: T) -> T:
    """Rank 0's value, on every rank: for what they could see differently, such as files and free memory."""
    if launched().size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def finish() -> None:
    """Leave the group of ranks, once all of them have come so far; nothing without one."""
    if launched().size == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

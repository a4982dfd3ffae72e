"""Times of device code: many calls in one CUDA graph, on buffers that rotate so that L2 is cold."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

CALLS = 16  # per graph, so that starting the graph is a small part of each
CACHE_BYTES = 256 * 2**20  # what must pass between two uses of a buffer: several times the L2 of any card


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call, and percentiles over the replays."""

    p20: float
    p50: float
    p80: float


def copies_for(num_bytes: int) -> int:
    """How many copies of a buffer of this size make a rotation that L2 cannot hold."""
    return max(2, min(64, -(-CACHE_BYTES // max(1, num_bytes))))


def measure(
    calls: Sequence[Callable[[], object]], replays: int = 20, before: Callable[[], object] | None = None
) -> Timing:
    """Time per call of a rotation of calls that do the same work on different buffers.

    On a GPU the calls are captured into one graph after a first run of each, which compiles. On the CPU, in
    the interpreter, they are called once: a trial of the script, not a measurement. `before` runs before
    every replay and is not timed.
    """
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for call in calls:
            call()
        spent = (time.perf_counter() - began) * 1e6 / len(calls)
        return Timing(spent, spent, spent)
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)
    ]
    for start, end in events:
        if before is not None:
            before()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1e3 / (rounds * len(calls)) for start, end in events)
    return Timing(*(times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)))

"""Times of device code: many calls in one CUDA graph, on buffers that rotate so that L2 is cold."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

CALLS = 16  # per graph, so that starting the graph is a small part of each
REPLAYS = 20
ASSUMED_RATE = 4e12  # bytes per second, for the estimate of a dry run
CACHE_BYTES = 256 * 2**20  # what must pass between two uses of a buffer: several times the L2 of any card
Calls = Sequence[Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call, and percentiles over the replays."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Percentiles of samples in microseconds."""
        ordered = sorted(samples)
        return cls(*(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))


def copies_for(num_bytes: int) -> int:
    """How many copies of a buffer of this size make a rotation that L2 cannot hold."""
    return max(2, min(64, -(-CACHE_BYTES // max(1, num_bytes))))


def measure(
    calls: Calls, device: str, replays: int = REPLAYS, before: Callable[[], object] | None = None
) -> Timing:
    """Time per call of a rotation of calls that do the same work on different buffers.

    On a GPU the calls are captured into one graph after a first run of each, which compiles. On the CPU, in
    the interpreter, they are called once: a trial of the benchmark, not a measurement. `before` runs before
    every replay and is not timed.
    """
    if device == "cpu":
        began = time.perf_counter()
        for call in calls:
            call()
        return Timing.of([(time.perf_counter() - began) * 1e6 / len(calls)])
    rounds = -(-CALLS // len(calls))
    graph = capture(calls, rounds)
    spent = replay_times(graph.replay, replays, before)
    return Timing.of([each / (rounds * len(calls)) for each in spent])


def capture(calls: Calls, rounds: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `rounds` times the calls, each of which has run once before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def replay_times(
    run: Callable[[], object], replays: int, before: Callable[[], object] | None = None, warm: int = 3
) -> list[float]:
    """Microseconds of each of `replays` runs of device work, after some that warm up."""
    for _ in range(warm):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, end in events:
        if before is not None:
            before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def copy_time(device: str) -> Timing:
    """Time of a kernel that copies `COPY_BYTES` bytes, half of them read and half written.

    Not `copy_`: on an H200 that reached 2.7 TB/s where attention reads at 4.5.
    """
    size = copy_bytes(device) // 8
    source, target = (torch.ones(size, device=device) for _ in range(2))
    return measure([lambda: torch.mul(source, 1.5, out=target)], device)


def copy_bytes(device: str) -> int:
    """Bytes read and written by `copy_time`: far more than L2."""
    return 2**31 if device != "cpu" else 2**21

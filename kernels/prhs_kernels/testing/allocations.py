"""What a piece of code takes from the CPU's allocator, as torch's profiler saw it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


@dataclasses.dataclass(frozen=True)
class Allocations:
    """peak: most bytes held at once, beyond what was held before. largest: bytes of the largest block."""

    peak: int
    largest: int


def allocations(run: Callable[[], object]) -> Allocations:
    """Run it and count, workspaces inside operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return Allocations(peak, max((event.nbytes() for event in events), default=0))

"""What a decode step costs at least: bytes over the bandwidth and a fixed time per launch.

A pure function of shapes and parameters. It answers one question before anything runs: is sparse attention
expected to gain anything here? At batch 1 and short contexts it is not, whatever the kernels do.
"""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.params import SelectorParams

SECONDS_PER_LAUNCH = 3e-6  # a small kernel inside a graph, its first and last bytes under way
DENSE_LAUNCHES = 2  # split-K kernel, merge
SPARSE_LAUNCHES = 4  # scan, choose, split-K kernel, merge; the rotation decides
RETRIEVAL_RATIO = 0.5  # assumed where nothing is known: every second unit scores its keys
USUAL_BANDWIDTH = 2e12  # bytes per second, where the driver does not say


@dataclasses.dataclass(frozen=True)
class StepFloor:
    """Seconds that the attention of all layers takes at least in one decode step."""

    dense: float
    sparse: float

    @property
    def gains(self) -> bool:
        return self.sparse < self.dense


def step_floor(
    params: SelectorParams,
    *,
    batch: int,
    kv_len: int,
    itemsize: int,
    windows: list[int | None] | None = None,
    retrieval_ratio: float = RETRIEVAL_RATIO,
    bandwidth: float = USUAL_BANDWIDTH,
) -> StepFloor:
    """Floors of one decode step.

    Args:
        kv_len: positions of each sequence. itemsize: bytes of an element of K and V.
        windows: the model's own sliding window of every layer, None for none.
        retrieval_ratio: fraction of the units that score their keys. bandwidth: bytes per second.
    """
    dense = sparse = 0.0
    rows, vector = batch * params.num_kv_heads, params.head_dim * itemsize
    for layer in range(params.num_layers):
        window = None if windows is None else windows[layer]
        seen = kv_len if window is None else min(kv_len, window)
        dense += 2 * rows * seen * vector / bandwidth + DENSE_LAUNCHES * SECONDS_PER_LAUNCH
        sparse += _sparse_layer(params, layer, batch, kv_len, seen, vector, retrieval_ratio, bandwidth)
    return StepFloor(dense, sparse)


def _sparse_layer(
    params: SelectorParams, layer: int, batch: int, kv_len: int, seen: int, vector: int, ratio: float,
    bandwidth: float,
) -> float:  # fmt: skip
    """Seconds of one layer: the window that PSAW leaves, of which CIS keeps and scans a part."""
    old = 0.0 if params.depth is None else params.depth.window_fraction(layer, params.num_layers)
    candidates = min(seen, round((1 - old) * kv_len) + params.num_sinks)
    time = params.time
    if time is None or bool((time.budget_ratio[layer] >= 1).all()):
        return 2 * batch * params.num_kv_heads * candidates * vector / bandwidth + (
            DENSE_LAUNCHES * SECONDS_PER_LAUNCH
        )
    total = 0.0
    for head in range(params.num_kv_heads):
        share = float(time.budget_ratio[layer, head])
        budget = int(share * seen) + int(time.budget_tokens[layer, head]) if share < 1 else seen
        grown = 1 + 2 * min(int(time.dilation[layer, head]), 1) / 3  # most neighbours coincide
        kept = min(candidates, budget * grown + params.num_sinks + params.num_local)
        scanned = ratio * candidates if kept < candidates else 0.0
        total += batch * (kept * (2 * vector + 4) + scanned * (vector + 4))
    return total / bandwidth + SPARSE_LAUNCHES * SECONDS_PER_LAUNCH


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that a kernel can expect of a device's memory: 0.87 of what its clock and bus give.

    0.87 is what a copying kernel reached on an H200 (4.26 of 4.9 TB/s).
    """
    if device.type != "cuda":
        return USUAL_BANDWIDTH
    properties = torch.cuda.get_device_properties(device)
    clock, bus = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 0.87 * 2 * clock * 1e3 * bus / 8 if clock and bus else USUAL_BANDWIDTH

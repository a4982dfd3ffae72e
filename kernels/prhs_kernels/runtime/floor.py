"""What attention of a decode step takes: bytes over the bandwidth, and a fixed time per stage that runs.

A pure function of shapes and parameters, for one question before anything runs: is sparse attention expected
to gain anything here? At batch 1 and short contexts it is not, whatever the kernels do. The times are of
an H200: layers at 16k and 32k positions are met within 5 %, shorter ones within 19 %.
"""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.params import SelectorParams

SECONDS_PER_LAUNCH = 3e-6  # a small kernel inside a graph, its first and last bytes under way
DENSE_LAUNCHES = 2  # split-K kernel, merge
SHARING_SECONDS = 12e-6  # what a layer takes beyond the bytes of its sets: gate, work list, attention, merge
CHOOSING_SECONDS = 15e-6  # beyond the bytes of the scan, in a layer in which any row retrieves, one or all
SCORE_BYTES = 12  # per query head and scanned position, fitted: a score is written, and read by the choice
RETRIEVAL_RATIO = 0.5  # assumed where nothing is known: every second unit scores its keys
USUAL_BANDWIDTH = 2e12  # bytes per second, where the driver does not say


@dataclasses.dataclass(frozen=True)
class StepFloor:
    """Seconds that the attention of all layers takes in one decode step."""

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
    """Both times of one decode step.

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
        sparse += _sparse_layer(params, layer, batch, kv_len, seen, itemsize, retrieval_ratio, bandwidth)
    return StepFloor(dense, sparse)


def sparse_layer_seconds(
    params: SelectorParams, *, rows: int, kept: float, scanned: float, itemsize: int, bandwidth: float
) -> float:
    """Seconds of retrieval and attention of one layer.

    Args:
        params: for the width of a head, the query group and what retrievals scan.
        rows: sequences x KV heads. kept: positions of a set, mean over the rows.
        scanned: positions that a row scores, mean over the rows, those that share included with none.
    """
    seconds = SHARING_SECONDS + rows * kept * (2 * params.head_dim * itemsize + 4) / bandwidth
    if scanned == 0:
        return seconds
    row = params.key_copy.scan_bytes(params.head_dim, itemsize) + SCORE_BYTES * params.group_size
    return seconds + CHOOSING_SECONDS + rows * scanned * row / bandwidth


def _sparse_layer(
    params: SelectorParams, layer: int, batch: int, kv_len: int, seen: int, itemsize: int, ratio: float,
    bandwidth: float,
) -> float:  # fmt: skip
    """Seconds of one layer: the window that PSAW leaves, of which CIS keeps and scans a part."""
    old = 0.0 if params.depth is None else params.depth.window_fraction(layer, params.num_layers)
    candidates = min(seen, round((1 - old) * kv_len) + params.num_sinks)
    heads, time = params.num_kv_heads, params.time
    if time is None or bool((time.budget_ratio[layer] >= 1).all()):
        vector = params.head_dim * itemsize
        return 2 * batch * heads * candidates * vector / bandwidth + DENSE_LAUNCHES * SECONDS_PER_LAUNCH
    total = retrieving = 0.0
    for head in range(heads):
        share = float(time.budget_ratio[layer, head])
        budget = int(share * seen) + int(time.budget_tokens[layer, head]) if share < 1 else seen
        grown = 1 + 2 * min(int(time.dilation[layer, head]), 1) / 3  # most neighbours coincide
        kept = min(candidates, budget * grown + params.num_sinks + params.num_local)
        total += kept
        retrieving += ratio if kept < candidates else 0.0
    return sparse_layer_seconds(
        params,
        rows=batch * heads,
        kept=total / heads,
        scanned=retrieving / heads * candidates,
        itemsize=itemsize,
        bandwidth=bandwidth,
    )


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that a kernel can expect of a device's memory: 0.87 of what its clock and bus give.

    0.87 is what a copying kernel reached on an H200 (4.26 of 4.9 TB/s).
    """
    if device.type != "cuda":
        return USUAL_BANDWIDTH
    properties = torch.cuda.get_device_properties(device)
    clock, bus = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 0.87 * 2 * clock * 1e3 * bus / 8 if clock and bus else USUAL_BANDWIDTH

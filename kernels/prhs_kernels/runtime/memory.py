"""How much memory a decode run needs beyond the weights, asked before any of it is taken."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from prhs_kernels.errors import ResourceError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.index_sets import selecting_layers, set_capacity

GIB = 2**30  # bytes
SLACK = 2**28  # bytes: the workspace of the matrix library, logits, the graph's own memory


@dataclasses.dataclass(frozen=True)
class RunShape:
    """What the size of a run depends on besides batch and length."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    selecting: int  # layers that choose sets
    copied: int  # bytes of a key's low-bit copy, 0 without one
    capacity: Callable[[int], int]  # indices of a set in a cache of so many slots

    @classmethod
    def of(cls, params: SelectorParams, windows: list[int | None], dtype: torch.dtype) -> RunShape:
        """Of a model with these parameters; windows: its own sliding window of every layer."""
        selecting = 0 if params.time is None else len(selecting_layers(params.time))
        return cls(
            params.num_layers,
            params.num_qo_heads,
            params.num_kv_heads,
            params.head_dim,
            dtype.itemsize,
            selecting,
            params.key_copy.scan_bytes(params.head_dim, 0) if selecting else 0,
            functools.partial(set_capacity, params, windows),
        )


def engine_bytes(shape: RunShape, batch: int, max_len: int) -> int:
    """Bytes of cache, index sets and scratch of a decode engine, nothing released."""
    rows = batch * shape.num_kv_heads
    cache = 2 * shape.num_layers * rows * max_len * shape.head_dim * shape.itemsize
    tables = max_len * shape.head_dim * shape.itemsize
    if not shape.selecting:
        return cache + tables + SLACK
    group = shape.num_qo_heads // shape.num_kv_heads
    anchors = group * shape.head_dim * shape.itemsize
    sets = shape.selecting * rows * (4 * shape.capacity(max_len) + anchors + max_len * shape.copied)
    scratch = rows * max_len * (4 * group + 4 + 1)  # scores, weights, bit masks
    return cache + tables + sets + scratch + SLACK


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CUDA device, those that torch keeps for later included."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def check_fits(needed: Callable[[int, int], int], batch: int, max_len: int, free: int | None) -> None:
    """Refuse a run that does not fit, and say what would.

    Args:
        needed: bytes of a run of (batch, max_len). free: bytes, None where it is not known.

    Raises:
        ResourceError: with both sizes, the longest context and the largest batch that fit.
    """
    wanted = needed(batch, max_len)
    if free is None or wanted <= free:
        return
    longest = largest_fitting(lambda length: needed(batch, length), max_len, free)
    most = largest_fitting(lambda size: needed(size, max_len), batch, free)
    fits = [f"{longest} positions at batch {batch}"] if longest else []
    fits += [f"batch {most} at {max_len} positions"] if most else []
    raise ResourceError(
        f"not enough device memory for batch {batch} x {max_len} positions: {wanted / GIB:.1f} GiB needed, "
        f"{free / GIB:.1f} GiB free; " + (f"what fits: {' or '.join(fits)}" if fits else "nothing would fit")
    )


def largest_fitting(needed: Callable[[int], int], most: int, free: int) -> int:
    """Largest size up to `most` of which `needed`, which grows with it, is at most `free`; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= free else (low, middle - 1)
    return low

"""The cases in which the kernels are compiled without a GPU: all, or a set with every pair of values."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

from prhs_kernels.ops.backend import HEAD_DIMS
from prhs_kernels.ops.retrieve.key_copy import MAX_FP32_FP8

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")
GROUPS = (1, 4, 7, 16)
ROW_LENGTHS = (1024, 4096, 32768, 131072, 1048576)
COPIES = ("int8", "fp8", "int4")
MANY_ROWS = "sparse_decode, many rows"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel for one shape. An axis that the kernel does not have holds 0 or an empty name."""

    kernel: str
    arch: int
    head_dim: int = 0
    dtype: str = ""
    group: int = 0
    length: int = 0  # slots of the cache


def full_grid() -> list[Case]:
    """Every kernel with every value of its axes."""
    heads = list(itertools.product(ARCHITECTURES, HEAD_DIMS, DTYPES, GROUPS))
    cases = [Case(k, *axes) for k in ("sparse_decode", "dense_decode", "scan", "gate") for axes in heads]
    sizes = list(itertools.product(ARCHITECTURES, HEAD_DIMS, DTYPES))
    cases += [Case(MANY_ROWS, *axes) for axes in heads if axes[1] <= 128 and axes[2] != "fp32"]
    cases += [Case("merge_state", *axes) for axes in sizes]
    for copy in COPIES:
        cases += [Case(f"key copy {copy}", *axes) for axes in sizes]
        fitting = [s for s in sizes if copy != "fp8" or s[1] <= MAX_FP32_FP8 or s[2] != "fp32"]
        cases += [Case(f"scan {copy}", *axes, group) for axes in fitting for group in (1, 16)]
    cases += [Case("window_prefill", *axes) for axes in sizes]
    for arch, group in itertools.product(ARCHITECTURES, GROUPS):
        cases += [Case("choose", arch, group=group, length=n) for n in ROW_LENGTHS]
        cases.append(Case("count_dropped", arch, group=group))
    return cases


def pairwise(cases: Sequence[Case]) -> list[Case]:
    """A subset in which every pair of values that occurs together in the grid still does; seeded, greedy."""
    left = {pair for case in cases for pair in _pairs(case)}
    order = list(cases)
    random.Random(0).shuffle(order)
    chosen = []
    while left:
        best = max(order, key=lambda case: len(left & _pairs(case)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(sorted(dataclasses.asdict(case).items()), 2))

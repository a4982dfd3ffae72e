"""Other launch shapes, to choose those of the stored table from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prhs_kernels.bench.cases import Case, Inputs
from prhs_kernels.bench.retrieval_cases import Retrieval, key_copies
from prhs_kernels.bench.timing import Calls
from prhs_kernels.ops.backend import num_sms
from prhs_kernels.ops.retrieve import launch
from prhs_kernels.ops.retrieve.config import ChooseConfig, ScanConfig, choose_config
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind


def tuning_cases(inputs: Inputs) -> Iterator[Case]:
    """Other launch shapes, for the stored table; results are not checked, these are the same kernels."""
    from prhs_kernels.ops.decode_config import DecodeConfig
    from prhs_kernels.ops.dense_decode.triton import dense_decode as dense
    from prhs_kernels.ops.sparse_decode.triton import sparse_decode as sparse

    p = inputs.problem
    kv_bytes = 2 * p.rows * p.head_dim * inputs.item

    @functools.cache
    def every() -> Retrieval:
        return Retrieval(inputs, 1.0)

    def sparse_call(config: DecodeConfig, i: int) -> None:
        sparse(*inputs.kv(i), inputs.indices[i % inputs.sets], inputs.count, None, inputs.scale, config)

    def dense_call(config: DecodeConfig, i: int) -> None:
        dense(*inputs.kv(i), None, inputs.scale, config)

    def scan_call(config: ScanConfig, i: int) -> None:
        query, keys, _ = inputs.kv(i)
        launch.scan(query, keys, inputs.spans, every().scratch, inputs.scale, config=config)

    @functools.cache
    def copied() -> list[KeyCopy | None]:
        return key_copies(inputs, KeyCopyKind.INT8)

    def copy_scan_call(config: ScanConfig, i: int) -> None:
        query, keys, _ = inputs.kv(i)
        key_copy = copied()[i % len(copied())]
        launch.scan(query, keys, inputs.spans, every().scratch, inputs.scale, key_copy, config)

    def choose_call(config: ChooseConfig, _: int) -> None:
        every().choose(config)

    def case(name: str, call: Callable[[Any, int], None], config: Any, num_bytes: int) -> Case:
        def prepare() -> Calls:
            if name in ("scan", "scan int8", "choose"):
                every().fill_work_list()
            if name == "choose":
                query, keys, _ = inputs.kv(0)
                launch.scan(query, keys, inputs.spans, every().scratch, inputs.scale)
            many = max(inputs.copies, inputs.sets) if name == "sparse" else 0
            return inputs.rotate(functools.partial(call, config), many)

        return Case(f"tune {name} {dataclasses.astuple(config)}", "tune", num_bytes, prepare)

    device = torch.device(inputs.device)
    sms = num_sms(device)
    for tile, splits, least in [
        ((64, 4, 3), 4, 1), ((64, 4, 3), 5, 1), ((64, 4, 3), 16, 4), ((64, 4, 3), 32, 4), ((64, 4, 3), 16, 3),
        ((128, 4, 2), 4, 1), ((32, 4, 3), 5, 1), ((64, 4, 2), 3, 1), ((64, 2, 2), 1, 1), ((64, 2, 2), 2, 1),
    ]:  # fmt: skip
        yield case("sparse", sparse_call, DecodeConfig(*tile, splits, least), kv_bytes * p.kept)
    for tile, per_sm in [
        ((64, 4, 3), 3), ((64, 4, 3), 4), ((64, 4, 4), 4), ((128, 4, 3), 2), ((128, 4, 2), 3),
        ((128, 8, 3), 2), ((64, 2, 3), 4), ((64, 2, 4), 4),
    ]:  # fmt: skip
        yield case("scan", scan_call, ScanConfig(*tile, per_sm * sms), kv_bytes // 2 * p.n)
    for tile, per_sm in [((128, 4, 4), 4), ((128, 4, 3), 4), ((128, 8, 3), 2), ((64, 4, 6), 4)]:
        num_bytes = p.rows * p.n * (p.head_dim + 8)
        yield case("scan int8", copy_scan_call, ScanConfig(*tile, per_sm * sms), num_bytes)
    choice = choose_config(p.n, p.group, p.kept, device)
    for other in [
        {"block_n": choice.block_n * 2}, {"sample": choice.sample * 2}, {"list_len": choice.list_len // 2},
        {"num_warps": 4, "programs": 4 * sms}, {"num_warps": 8, "programs": 2 * sms},
        {"num_warps": 16, "programs": sms},
    ]:  # fmt: skip
        yield case("choose", choose_call, dataclasses.replace(choice, **other), 4 * p.rows * p.n)
    for tile, splits in [((64, 4, 3), 6), ((64, 4, 3), 12), ((64, 4, 4), 4), ((128, 8, 3), 4)]:
        yield case("dense", dense_call, DecodeConfig(*tile, splits), kv_bytes * p.n)

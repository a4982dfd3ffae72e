"""Timed cases of retrieval, its stages and whole layers; other launch shapes to choose from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prhs_kernels.bench.cases import LOCAL, SINKS, Inputs, Row, describe, run_case
from prhs_kernels.ops.retrieve import launch
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.config import ScanConfig, SelectConfig, scan_config
from prhs_kernels.ops.retrieve.state import RetrievalRule, RetrievalScratch, RetrievalState
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.testing.tolerances import tolerance


class Retrieval:
    """Buffers for retrievals of a problem; `sharing` heads of each sequence share, the others retrieve."""

    def __init__(self, inputs: Inputs, sharing: int) -> None:
        p, device = inputs.problem, inputs.device
        self.inputs, self.sharing = inputs, sharing
        heads = torch.arange(p.num_kv_heads, device=device)
        self.rule = RetrievalRule(
            gate=(heads < sharing).int(),
            tau_cos=torch.full((p.num_kv_heads,), -2.0, device=device),
            block=torch.full((p.num_kv_heads,), 2**30, dtype=torch.int32, device=device),
            dilation=torch.ones(p.num_kv_heads, dtype=torch.int32, device=device),
            num_local=LOCAL,
        )
        # dilation brings up to two thirds more: the set then has about p.kept positions
        k = max(1, (p.kept - SINKS - LOCAL) * 3 // 5)
        self.budget = torch.full((p.batch, p.num_kv_heads), k, dtype=torch.int32, device=device)
        dtype = inputs.queries.dtype
        self.state = RetrievalState.allocate(
            p.batch, p.num_kv_heads, p.group, p.head_dim, p.kept + 4096, dtype, device
        )
        self.scratch = RetrievalScratch.allocate(p.batch, p.num_kv_heads, p.group, p.n, device)
        self.step(0)  # every head has a set from here on

    def step(self, i: int) -> None:
        query, keys, _ = self.inputs.kv(i)
        retrieve(
            query, keys, spans=self.inputs.spans, budget=self.budget, rule=self.rule, state=self.state,
            scale=self.inputs.scale, scratch=self.scratch, backend="triton",
        )  # fmt: skip

    def layer(self, i: int) -> object:
        """Retrieval and attention, as a decode step runs them."""
        self.step(i)
        return sparse_decode(
            *self.inputs.kv(i), self.state.indices, count=self.state.count, spans=self.inputs.spans,
            scale=self.inputs.scale, backend="triton",
        )  # fmt: skip

    def remember(self) -> None:
        """Keep the sizes of the sets: sharing heads add a slot in every call."""
        self.counts = self.state.count.clone()

    def restore(self) -> None:
        self.state.count.copy_(self.counts)

    def gate(self) -> None:
        query, keys, _ = self.inputs.kv(0)
        launch.gate(
            query, query, keys.shape[1], self.inputs.spans, self.budget, self.rule, self.state, self.scratch
        )

    def check(self) -> None:
        """The log-sum-exp of a row, and that no position of its top-k is missing, near ties aside."""
        p = self.inputs.problem
        query, keys, _ = self.inputs.kv(0)
        self.state.reset()
        self.step(0)
        scores = (query[0, : p.group, 0].double() @ keys[0, 0].double().T) * self.inputs.scale
        lse = scores.logsumexp(-1)
        found = self.state.lse[0, 0].double()
        bound = tolerance(lse.float(), lse, float(scores.abs().max()) * p.head_dim**0.5)
        assert float((found - lse).abs().max()) <= bound, "lse of the scan"
        weights = (scores - lse[:, None]).exp().sum(0)
        chosen = torch.zeros(p.n, dtype=torch.bool, device=query.device)
        chosen[self.state.indices[0, 0, : int(self.state.count[0, 0])].long()] = True
        middle = slice(SINKS, p.n - LOCAL)
        best = weights[middle].topk(int(self.budget[0, 0]))
        clear = best.values > best.values[-1] * (1 + 1e-4)
        assert bool(chosen[middle][best.indices][clear].all()), "a position of the top-k is missing"
        # a dilated set has neighbours of the best third besides, nothing else
        most = int(self.budget[0, 0]) + 2 * (int(self.budget[0, 0]) // 3)
        assert int(chosen[middle].sum()) <= most, "more positions than dilation allows"


def retrieval_cases(inputs: Inputs) -> Iterator[Row]:
    """The stages one by one with every row retrieving, then whole steps at three retrieval ratios."""
    p = inputs.problem
    try:
        every = Retrieval(inputs, 0)
        every.check()
    except Exception as error:  # the report says what failed
        yield Row(str(p), "retrieve", None, 0, describe(error))
        return
    scan_bytes = p.rows * p.n * (p.head_dim * inputs.item + 4)
    every.gate()  # fills the work list once; the stages below leave it as it is

    def scan(i: int) -> None:
        query, keys, _ = inputs.kv(i)
        launch.scan(query, keys, inputs.spans, every.scratch, inputs.scale)

    def weigh() -> None:
        launch.weigh(p.num_kv_heads, inputs.spans, LOCAL, every.state, every.scratch, inputs.keys.device)

    def select() -> None:
        launch.select(p.num_kv_heads, inputs.spans, every.budget, every.rule, every.state, every.scratch)

    yield run_case(p, "scan", scan_bytes, lambda: inputs.rotate(scan))
    yield run_case(p, "weigh", p.rows * p.n * 4 * (p.group + 1), lambda: [weigh])
    select_bytes = p.rows * 4 * (p.n + p.kept)
    yield run_case(p, "select + compact", select_bytes, lambda: [select], note="warm L2, as in a step")
    every.scratch.work.zero_()
    for case, sharing in (
        ("layer, all share", p.num_kv_heads),
        ("layer, 1 of 8 retrieves", p.num_kv_heads * 7 // 8),
        ("layer, all retrieve", 0),
    ):
        moved = p.rows * p.kept * (2 * p.head_dim * inputs.item + 4)
        moved += scan_bytes * (p.num_kv_heads - sharing) // p.num_kv_heads
        some = Retrieval(inputs, sharing)
        some.remember()
        yield run_case(p, case, moved, functools.partial(inputs.rotate, some.layer), before=some.restore)


def tuning_cases(inputs: Inputs) -> Iterator[Row]:
    """Other launch shapes, for the stored table."""
    from prhs_kernels.ops.decode_config import DecodeConfig
    from prhs_kernels.ops.dense_decode.triton import dense_decode as dense
    from prhs_kernels.ops.sparse_decode.triton import sparse_decode as sparse

    p = inputs.problem
    kv_bytes = 2 * p.rows * p.head_dim * inputs.item
    count = torch.full((p.batch, p.num_kv_heads), p.kept, dtype=torch.int32, device=inputs.device)
    every = Retrieval(inputs, 0)
    every.gate()

    def sparse_call(config: DecodeConfig, i: int) -> None:
        indices = inputs.indices[i % len(inputs.indices)]
        sparse(*inputs.kv(i), indices, count, None, inputs.scale, config)

    def dense_call(config: DecodeConfig, i: int) -> None:
        dense(*inputs.kv(i), None, inputs.scale, config)

    def scan_call(config: ScanConfig, i: int) -> None:
        query, keys, _ = inputs.kv(i)
        launch.scan(query, keys, inputs.spans, every.scratch, inputs.scale, config)

    def select_call(config: SelectConfig, i: int) -> None:
        launch.select(
            p.num_kv_heads, inputs.spans, every.budget, every.rule, every.state, every.scratch, config
        )

    def row(name: str, call: Callable[[Any, int], None], config: Any, num_bytes: int) -> Row:
        many = max(len(inputs.keys), len(inputs.indices)) if name == "sparse" else 0
        rotation = functools.partial(inputs.rotate, functools.partial(call, config), many)
        return run_case(p, f"tune {name} {dataclasses.astuple(config)}", num_bytes, rotation)

    base = scan_config(p.head_dim, inputs.keys.dtype, p.rows, p.n, inputs.keys.device)
    for tile in [(64, 4, 3), (64, 4, 4), (32, 2, 4), (128, 8, 3), (32, 4, 4)]:
        for splits in (2, 4, 6, 8, 16):
            yield row("sparse", sparse_call, DecodeConfig(*tile, splits), kv_bytes * p.kept)
    for tile in [(64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 3), (128, 8, 4), (32, 2, 5)]:
        for programs in (base.programs // 2, base.programs, base.programs * 2):
            yield row("scan", scan_call, ScanConfig(*tile, base.chunk, programs), kv_bytes // 2 * p.n)
    every.scratch.work[1] = p.rows  # what the scan hands on
    launch.weigh(p.num_kv_heads, inputs.spans, LOCAL, every.state, every.scratch, inputs.keys.device)
    for block, small, pack, warps in [
        (32768, 2048, 8192, 16),
        (32768, 2048, 4096, 16),
        (8192, 2048, 8192, 16),
    ]:
        shape = SelectConfig(block, small, pack, block == 32768, warps)
        yield row("select", select_call, shape, 4 * p.rows * p.n)
    for tile in [(64, 4, 3), (64, 4, 4), (128, 8, 3)]:
        for splits in (4, 6, 8, 16):
            yield row("dense", dense_call, DecodeConfig(*tile, splits), kv_bytes * p.n)
    every.scratch.work.zero_()

"""Timed cases of retrieval, its stages and whole layers; other launch shapes to choose from."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from prhs_kernels.bench.cases import LOCAL, QKV, SINKS, Case, Inputs
from prhs_kernels.bench.timing import CALLS, Calls
from prhs_kernels.ops.retrieve import launch
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.config import ChooseConfig
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind
from prhs_kernels.ops.retrieve.state import (
    Decision,
    GateInputs,
    RetrievalRule,
    RetrievalScratch,
    RetrievalState,
    capacity_for,
)
from prhs_kernels.ops.rope_append.api import rope_append
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.params import Gate
from prhs_kernels.testing.tolerances import tolerance

LONGEST_BLOCK = 64  # steps


def block_of(ratio: float) -> int | None:
    """Steps from one retrieval of every row to the next with which this share of the units retrieves."""
    steps = round(1 / ratio) if ratio > 0 else 0
    return steps if 2 <= steps <= LONGEST_BLOCK and math.isclose(steps * ratio, 1.0) else None


def case_name(what: str, ratio: float, kind: KeyCopyKind, block: int | None = None) -> str:
    """Of a case in which rows retrieve; without a block they are the same ones in every step."""
    name = f"{what}, ρ = {ratio:.3g}" + (f", in blocks of {block}" if block else "")
    return name + (f", {kind.value} keys" if kind != KeyCopyKind.EXACT else "")


class Retrieval:
    """Buffers for retrievals of a problem, `ratio` of whose rows retrieve in every step; the others share.

    A row shares while the cosine with the query of its last retrieval is above 1/2. The sharing rows get the
    same query in every copy, the others random ones: gate, work list and append run as in a decode step.
    With a block of more than one step these rows retrieve in its first step, and share in the others: their
    query changes with the block. `kind`: the keys that are scanned.
    """

    def __init__(
        self, inputs: Inputs, ratio: float, kind: KeyCopyKind = KeyCopyKind.EXACT, block: int = 1
    ) -> None:
        p, device = inputs.problem, inputs.device
        self.inputs, self.wanted, self.block = inputs, round(ratio * p.rows), block
        self.kind, self.copies = kind, key_copies(inputs, kind)

        def per_head(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((p.num_kv_heads,), value, dtype=dtype, device=device)

        self.rule = RetrievalRule(
            gate=per_head(Gate.POST_ROPE, torch.int32),
            tau_cos=per_head(0.5, torch.float32),
            block=per_head(2**30, torch.int32),
            dilation=per_head(1, torch.int32),
            num_local=LOCAL,
        )
        # dilation brings up to two thirds more: the set then has about p.kept positions
        k = max(1, (p.kept - SINKS - LOCAL) * 3 // 5)
        self.budget = torch.full((p.batch, p.num_kv_heads), k, dtype=torch.int32, device=device)
        # as many slots as calls may append before the sizes are put back
        capacity = capacity_for(k, SINKS, LOCAL, 1, 6 * max(CALLS, inputs.copies))
        moving = spread(p.rows, self.wanted).to(device).view(p.batch, p.num_kv_heads, 1)
        moving = moving.expand(-1, -1, p.group).reshape(p.batch, p.num_qo_heads, 1, 1)
        # two take turns where calls go on to the next block: the first one's is not that of the last
        queries = inputs.queries if block == 1 else inputs.queries[:2]
        self.queries = torch.where(moving, queries, queries[:1])
        self.state = RetrievalState.allocate(
            p.batch, p.num_kv_heads, p.group, p.head_dim, capacity, inputs.dtype, device
        )
        self.scratch = RetrievalScratch.allocate(p.batch, p.num_kv_heads, p.group, p.n, device)
        self.step(0)  # every row has a set from here on
        self.counts = self.state.count.clone()

    def qkv(self, i: int) -> QKV:
        _, keys, values = self.inputs.kv(i)
        return self.queries[i // self.block % len(self.queries)], keys, values

    def step(self, i: int, gated: bool = False) -> None:
        query, keys, _ = self.qkv(i)
        retrieve(
            query, keys, spans=self.inputs.spans, budget=self.budget, rule=self.rule, state=self.state,
            scale=self.inputs.scale, scratch=self.scratch, key_copy=self.copies[i % len(self.copies)],
            gated=gated, backend="triton",
        )  # fmt: skip

    @functools.cached_property
    def projected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A fused projection that holds the queries of the first call, angles of 0, and the last slot."""
        p, device = self.inputs.problem, self.inputs.device
        query, keys, values = self.qkv(0)
        qkv = torch.cat([query, keys[:, :, -1:], values[:, :, -1:]], dim=1).flatten(1)
        cos = torch.ones(p.batch, p.head_dim // 2, dtype=query.dtype, device=device)
        slots = torch.full((p.batch,), p.n - 1, dtype=torch.int32, device=device)
        return qkv, cos, torch.zeros_like(cos), slots

    def rotate(self, i: int, gate: bool) -> None:
        """`rope_append` on the buffers of a call, with the gate in it or without."""
        qkv, cos, sin, slots = self.projected
        _, keys, values = self.qkv(i)
        decides = GateInputs(self.inputs.spans, self.budget, self.rule, self.state, self.scratch)
        rope_append(
            qkv, keys, values, cos=cos, sin=sin, slots=slots, gate=decides if gate else None, backend="triton"
        )

    def layer(self, i: int, gated: bool = False) -> torch.Tensor:
        """Retrieval and attention, as a decode step runs them; gated: behind `rotate`, which has decided."""
        self.step(i, gated)
        output, _ = sparse_decode(
            *self.qkv(i), self.state.indices, count=self.state.count, spans=self.inputs.spans,
            scale=self.inputs.scale, mean_kept=self.inputs.problem.kept,
            decision=self.state.decision, backend="triton",
        )  # fmt: skip
        return output

    def calls(self) -> Calls:
        """Layers, in whole blocks, an even number of them."""
        least = CALLS if self.inputs.device != "cpu" else 1
        blocks = 2 * -(-least // (2 * self.block))
        return self.inputs.rotate(self.layer, 0 if self.block == 1 else blocks * self.block)

    def restore(self) -> None:
        """Back to the sizes after the first step: sharing rows add a slot in every call."""
        self.state.count.copy_(self.counts)

    def retrieved(self) -> int:
        """Rows that retrieved in the last step."""
        return int((self.state.decision == Decision.RETRIEVE).sum())

    def values(self) -> dict[str, float]:
        """What the row says besides its time; two more blocks show who retrieves."""
        p, item = self.inputs.problem, self.inputs.item
        retrieved = []
        for i in range(2 * self.block):
            self.layer(i)
            retrieved.append(self.retrieved())
        kept, ratio = float(self.counts.double().mean()), sum(retrieved) / (len(retrieved) * p.rows)
        moved = p.rows * kept * (2 * p.head_dim * item + 4) + ratio * scan_bytes(self.inputs, self.kind)
        return {"retrieval_ratio": ratio, "mean_kept": kept, "num_bytes": moved}

    def fill_work_list(self) -> None:
        """Put every row on it; the stages after the gate leave it as it is, so they can be timed alone."""
        query = self.qkv(0)[0]
        self.state.reset()
        self.scratch.work.zero_()
        launch.gate(query, query, self.inputs.spans, self.budget, self.rule, self.state, self.scratch)

    def choose(self, config: ChooseConfig | None = None) -> None:
        """On the scores of the last scan."""
        launch.choose(self.inputs.spans, self.budget, self.rule, self.state, self.scratch, config=config)

    def check(self) -> None:
        """The log-sum-exp of a row, and that no position of its top-k is missing, near ties aside."""
        p = self.inputs.problem
        query, keys, _ = self.qkv(0)
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

    def check_layer(self) -> None:
        """Attention in the first and last step of a block, and that in each of two as many rows retrieved as
        were meant to."""
        if self.kind == KeyCopyKind.EXACT:
            self.check()
        for i in range(self.block, 3 * self.block):
            output, wanted = self.layer(i), self.wanted if i % self.block == 0 else 0
            assert self.retrieved() == wanted, f"step {i}: {self.retrieved()} rows retrieved, not {wanted}"
            if i in (self.block, 2 * self.block - 1):
                right = self.inputs.sparse_outputs(self.qkv(i), self.state.indices, self.state.count)
                self.inputs.check(output, right)
        self.restore()


def spread(rows: int, wanted: int) -> torch.Tensor:
    """`[rows]` bool of which `wanted` are true, evenly spread."""
    return (torch.arange(rows + 1) * wanted // rows).diff() > 0


def scan_bytes(inputs: Inputs, kind: KeyCopyKind = KeyCopyKind.EXACT) -> int:
    """Byte floor of a scan of every row: the keys, and a score per position."""
    p = inputs.problem
    return p.rows * p.n * (kind.scan_bytes(p.head_dim, inputs.item) + 4)


def layer_cases(inputs: Inputs, ratios: Sequence[float], kinds: Sequence[KeyCopyKind]) -> Iterator[Case]:
    """Whole steps of a layer, retrieval included, where this share of the rows retrieves from these keys: the
    same rows in every step, and all rows in the first step of a block.

    Where nobody retrieves one kind is enough, and the step is timed behind `rope_append` as well, which then
    has the gate in it, as in a decode step.
    """
    p = inputs.problem
    attention = p.rows * p.kept * (2 * p.head_dim * inputs.item + 4)
    for ratio in ratios:
        share = round(ratio * p.rows) / p.rows
        for kind in kinds if share else kinds[:1]:
            yield _layer_case(inputs, share, kind, attention)
        block = block_of(ratio)
        for kind in kinds if block else ():
            yield _layer_case(inputs, ratio, kind, attention, block)
    if 0 in ratios:
        yield from _rotated_cases(inputs, attention)


def _layer_case(
    inputs: Inputs, ratio: float, kind: KeyCopyKind, attention: int, block: int | None = None
) -> Case:
    """`attention`: its bytes; those of the scans are added."""

    @functools.cache
    def made() -> Retrieval:
        return Retrieval(inputs, 1.0, kind, block) if block else Retrieval(inputs, ratio, kind)

    def prepare() -> Calls:
        made().check_layer()
        return made().calls()

    num_bytes = attention + int(ratio * scan_bytes(inputs, kind))
    restore, values = (lambda: made().restore()), (lambda: made().values())
    name = case_name("layer", ratio, kind, block)
    return Case(name, "layer", num_bytes, prepare, before=restore, values=values)


def _rotated_cases(inputs: Inputs, attention: int) -> Iterator[Case]:
    """`rope_append` alone, and with the gate in it and the layer behind it, every row sharing."""
    p = inputs.problem
    rows = p.batch * (p.num_qo_heads + 2 * p.num_kv_heads) * p.head_dim * inputs.item
    made = functools.cache(functools.partial(Retrieval, inputs, 0.0))

    def alone() -> Calls:
        return inputs.rotate(functools.partial(made().rotate, gate=False))

    def both(i: int) -> torch.Tensor:
        made().rotate(i, gate=True)
        return made().layer(i, gated=True)

    def behind() -> Calls:
        both(0)  # the last slot's key is another one now
        output = both(1)
        assert not made().retrieved(), f"{made().retrieved()} rows retrieved, all were meant to share"
        query, keys, values = made().qkv(1)
        wanted = inputs.sparse_outputs((query, keys, values), made().state.indices, made().state.count)
        inputs.check(output, wanted)
        made().restore()
        return inputs.rotate(both)

    yield Case("rope_append", "stage", 2 * rows, alone)
    name = "rope_append with the gate + layer, ρ = 0"
    yield Case(name, "stage", 2 * rows + attention, behind, before=lambda: made().restore())


def stage_cases(inputs: Inputs) -> Iterator[Case]:
    """The stages of retrieval one by one, every row retrieving."""
    p = inputs.problem

    @functools.cache
    def every() -> Retrieval:
        made = Retrieval(inputs, 1.0)
        made.check()
        return made

    def scan(key_copies: Sequence[KeyCopy | None], i: int) -> None:
        query, keys, _ = inputs.kv(i)
        key_copy = key_copies[i % len(key_copies)]
        launch.scan(query, keys, inputs.spans, every().scratch, inputs.scale, key_copy)

    def scans(kind: KeyCopyKind) -> Calls:
        every().fill_work_list()
        return inputs.rotate(functools.partial(scan, key_copies(inputs, kind)))

    def choose() -> Calls:
        every().fill_work_list()
        scan([None], 0)
        return [every().choose]

    for kind in KeyCopyKind:
        name = "scan" if kind == KeyCopyKind.EXACT else f"scan, {kind.value} keys"
        num_bytes = p.rows * p.n * (kind.scan_bytes(p.head_dim, inputs.item) + 4)
        yield Case(name, "stage", num_bytes, functools.partial(scans, kind))
    num_bytes = p.rows * 4 * (p.n * (p.group + 2) + p.kept)
    yield Case("choose", "stage", num_bytes, choose, note="warm L2, as in a step")


def key_copies(inputs: Inputs, kind: KeyCopyKind) -> list[KeyCopy | None]:
    """A copy of the keys of every buffer."""
    if kind == KeyCopyKind.EXACT:
        return [None]
    p = inputs.problem
    copies: list[KeyCopy | None] = []
    for i in range(inputs.copies):
        copy = KeyCopy.allocate(kind, p.batch, p.num_kv_heads, p.n, p.head_dim, inputs.device)
        copy.write(inputs.kv(i)[1], backend="triton")
        copies.append(copy)
    return copies

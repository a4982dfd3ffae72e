"""What is timed: a problem, its tensors, and a case that is checked before it runs against the clock."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from prhs_kernels.bench.shapes import Point
from prhs_kernels.bench.timing import Calls, Timing, copies_for, measure
from prhs_kernels.errors import ResourceError
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.spans import candidate_spans
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.testing.tolerances import assert_as_exact_as

SINKS, LOCAL = 4, 32
MOST_BYTES = 16 * 2**30  # of K and V, where two copies would do but for the sets that are read of them
Kind = Literal["dense", "masked", "sparse", "stage", "layer", "peer", "tune"]
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Status = Literal["ok", "wrong", "failed", "out of memory"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One decode step of one layer: `kept` positions of `n` per KV head."""

    name: str
    batch: int
    n: int
    num_qo_heads: int
    num_kv_heads: int
    kept: int
    head_dim: int = 128

    @classmethod
    def of(cls, point: Point) -> Problem:
        shape = point.shape
        heads = shape.num_qo_heads, shape.num_kv_heads
        return cls(shape.name, point.batch, point.context, *heads, point.kept, shape.head_dim)

    @property
    def rows(self) -> int:
        return self.batch * self.num_kv_heads

    @property
    def group(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    def __str__(self) -> str:
        heads = f"{self.num_qo_heads}/{self.num_kv_heads} heads, d {self.head_dim}"
        return f"{self.name}: batch {self.batch} x {self.n}, {heads}, C {self.kept}"


@dataclasses.dataclass(frozen=True)
class Case:
    """`prepare` checks the result against the reference and gives the calls to time, which do the same work.

    num_bytes: the byte floor, 0 where there is none. before: runs untimed before every replay. values:
    further figures of the row, asked for after the timing; a `num_bytes` among them replaces the planned one.
    """

    name: str
    kind: Kind
    num_bytes: int
    prepare: Callable[[], Calls]
    before: Callable[[], object] | None = None
    note: str = ""
    values: Callable[[], dict[str, float]] = dict

    def key(self, problem: Problem) -> str:
        """What identifies the row; dense attention is the same whatever is kept."""
        if self.kind in ("dense", "masked"):
            problem = dataclasses.replace(problem, kept=0)
        return f"{problem} | {self.name}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement, or why there is none."""

    problem: Problem
    case: str
    kind: Kind
    num_bytes: int
    timing: Timing | None = None
    status: Status = "ok"
    error: str = ""
    note: str = ""
    values: dict[str, float] = dataclasses.field(default_factory=dict)


def run(case: Case, problem: Problem, device: str, needed: str = "") -> Row:
    """Check, measure, and turn whatever goes wrong into a row: a wrong result is never timed."""
    row = Row(problem, case.name, case.kind, case.num_bytes, note=case.note)
    try:
        timing = measure(case.prepare(), device, before=case.before)
        values = case.values()
        num_bytes = int(values.pop("num_bytes", case.num_bytes))
        return dataclasses.replace(row, timing=timing, num_bytes=num_bytes, values=values)
    except Exception as error:  # the report says what failed
        return failure(row, error, needed)


def failure(row: Row, error: Exception, needed: str = "") -> Row:
    """The row with what went wrong; `needed` says how much memory it takes."""
    if isinstance(error, AssertionError):
        return dataclasses.replace(row, status="wrong", error=f"wrong result, not timed: {describe(error)}")
    if isinstance(error, torch.cuda.OutOfMemoryError | ResourceError):  # the engine's says what it needs
        text = f"{needed}: {describe(error)}" if needed else describe(error)
        return dataclasses.replace(row, status="out of memory", error=text)
    return dataclasses.replace(row, status="failed", error=describe(error))


def describe(error: Exception) -> str:
    """One line about an exception."""
    name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return (name + str(error)).partition("\n")[0][:300]


class Inputs:
    """Random tensors of a problem, made when first used: as many K and V as a cold L2 needs, as many sets."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.problem, self.dtype, self.device, self.seed = problem, dtype, device, seed
        self.item = torch.finfo(dtype).bits // 8
        self.scale = problem.head_dim**-0.5
        self.sets = self._copies(problem.kept)
        # a layer whose rows share reads its sets only, the same ones in every call: of other keys each time
        one = 2 * problem.rows * problem.n * problem.head_dim * self.item
        self.copies = max(self._copies(problem.n), min(self.sets, MOST_BYTES // one))

    def _copies(self, positions: int) -> int:
        p = self.problem
        return copies_for(2 * p.rows * positions * p.head_dim * self.item) if self.device != "cpu" else 2

    @property
    def num_bytes(self) -> int:
        """Memory that the cases of the problem need at most, about."""
        p = self.problem
        numbers = 2 * self.copies * p.rows * p.n * p.head_dim
        scratch = 2 * 4 * p.rows * p.n * (p.group + 2)  # retrieval; twice for its reference or its peers
        exact = 3 * 8 * p.num_kv_heads * p.n * p.head_dim  # float64, a sequence at a time
        return numbers * self.item + scratch + exact + 8 * p.rows * p.n

    def _random(self, number: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed + number)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

    @functools.cached_property
    def queries(self) -> torch.Tensor:
        p = self.problem
        return self._random(0, self.copies, p.batch, p.num_qo_heads, 1, p.head_dim)

    @functools.cached_property
    def keys(self) -> torch.Tensor:
        p = self.problem
        return self._random(1, self.copies, p.batch, p.num_kv_heads, p.n, p.head_dim)

    @functools.cached_property
    def values(self) -> torch.Tensor:
        p = self.problem
        return self._random(2, self.copies, p.batch, p.num_kv_heads, p.n, p.head_dim)

    @functools.cached_property
    def indices(self) -> torch.Tensor:
        """`[sets, batch, num_kv_heads, kept]` int32: random, ascending: no locality."""
        p = self.problem
        generator = torch.Generator(self.device).manual_seed(self.seed + 3)
        drawn = []
        for _ in range(self.sets):
            noise = torch.rand(p.batch, p.num_kv_heads, p.n, device=self.device, generator=generator)
            drawn.append(noise.topk(p.kept, dim=-1).indices.sort(dim=-1).values.int())
        return torch.stack(drawn)

    @functools.cached_property
    def count(self) -> torch.Tensor:
        p = self.problem
        return torch.full((p.batch, p.num_kv_heads), p.kept, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def spans(self) -> torch.Tensor:
        used = torch.full((self.problem.batch,), self.problem.n, device=self.device)
        return candidate_spans(used, torch.zeros_like(used), num_sinks=SINKS, num_local=LOCAL)

    def kv(self, i: int) -> QKV:
        i %= self.copies
        return self.queries[i], self.keys[i], self.values[i]

    def rotate(self, call: Callable[[int], object], count: int = 0) -> Calls:
        """The call for every copy of the buffers."""
        return [functools.partial(call, i) for i in range(count or self.copies)]

    @functools.cached_property
    def dense_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of the first copy: plain PyTorch in this precision, and in float64."""

        def attend(b: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return dense_decode(query, keys, values, scale=self.scale, backend="reference")[0]

        return by_sequence(self.kv(0), attend)

    def sparse_outputs(
        self, qkv: QKV, indices: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over the first `count` of indices `[batch, num_kv_heads, max_kept]`."""

        def attend(b: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            some, size = indices[b, None], count[b, None]
            return sparse_decode(
                query, keys, values, some, count=size, scale=self.scale, backend="reference"
            )[0]

        return by_sequence(qkv, attend)

    def check(self, output: torch.Tensor, wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
        """AssertionError where the output is further from float64 than PyTorch in this precision."""
        assert_as_exact_as(output.reshape(wanted[0].shape), *wanted, "output")


def by_sequence(qkv: QKV, attend: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend(b, query, keys, values)` in the tensors' precision and in float64.

    A sequence at a time: float64 copies of all of K and V would not fit.
    """
    stock, exact = [], []
    for b in range(len(qkv[0])):
        one = [tensor[b, None] for tensor in qkv]
        stock.append(attend(b, *one))
        exact.append(attend(b, *(tensor.double() for tensor in one)))
    return torch.cat(stock), torch.cat(exact)


def sparse_cases(inputs: Inputs) -> Iterator[Case]:
    """Attention over given sets, merge included."""
    p = inputs.problem

    def call(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = inputs.indices[i % inputs.sets]
        return sparse_decode(*inputs.kv(i), indices, count=inputs.count, scale=inputs.scale, backend="triton")

    def prepare() -> Calls:
        wanted = inputs.sparse_outputs(inputs.kv(0), inputs.indices[0], inputs.count)
        inputs.check(call(0)[0], wanted)
        return inputs.rotate(call, max(inputs.copies, inputs.sets))

    yield Case(
        "sparse_decode + merge", "sparse", p.rows * p.kept * (2 * p.head_dim * inputs.item + 4), prepare
    )

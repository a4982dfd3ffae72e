"""Timed cases: what runs, on which bytes, and what the same bytes would take at copy bandwidth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prhs_kernels.bench.timing import Timing, copies_for, measure
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.spans import candidate_spans
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.testing.tolerances import assert_as_exact_as


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

    @property
    def rows(self) -> int:
        return self.batch * self.num_kv_heads

    @property
    def group(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    def __str__(self) -> str:
        heads = f"{self.num_qo_heads}/{self.num_kv_heads} heads"
        return f"{self.name}: batch {self.batch} x {self.n}, {heads}, C {self.kept}"


PROBLEMS = [
    Problem("gqa-32k", 8, 32768, 32, 8, 1024),
    Problem("paper", 16, 2048, 32, 32, 256),
    Problem("gqa-4k", 8, 4096, 32, 8, 1024),
    Problem("gqa-16k", 8, 16384, 32, 8, 1024),
]
TOY_PROBLEMS = [Problem("toy", 1, 96, 4, 2, 24, 64)]
SINKS, LOCAL = 4, 32
Calls = list[Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement. num_bytes: the byte floor of what was run, 0 where there is none; error: why not."""

    problem: str
    case: str
    timing: Timing | None
    num_bytes: int
    error: str = ""
    note: str = ""


class Inputs:
    """Random tensors of a problem: as many K and V as a cold L2 needs, and as many sets."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: str) -> None:
        p, self.problem, self.device = problem, problem, device
        self.item = torch.finfo(dtype).bits // 8
        kv_bytes = 2 * p.rows * p.n * p.head_dim * self.item
        copies = copies_for(kv_bytes) if device == "cuda" else 2
        self.queries = torch.randn(copies, p.batch, p.num_qo_heads, 1, p.head_dim, device=device).to(dtype)
        shape = (copies, p.batch, p.num_kv_heads, p.n, p.head_dim)
        self.keys, self.values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        self.scale = p.head_dim**-0.5
        sets = copies_for(2 * p.rows * p.kept * p.head_dim * self.item) if device == "cuda" else 2
        noise = torch.rand(sets, p.batch, p.num_kv_heads, p.n, device=device)
        self.indices = noise.topk(p.kept, dim=-1).indices.sort(dim=-1).values.int()
        del noise
        used = torch.full((p.batch,), p.n, device=device)
        self.spans = candidate_spans(used, torch.zeros_like(used), num_sinks=SINKS, num_local=LOCAL)

    def kv(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        i %= len(self.keys)
        return self.queries[i], self.keys[i], self.values[i]

    def rotate(self, call: Callable[[int], object], count: int = 0) -> Calls:
        """The call for every copy of the buffers."""
        return [functools.partial(call, i) for i in range(count or len(self.keys))]


def run_case(
    problem: Problem | str,
    case: str,
    num_bytes: int,
    prepare: Callable[[], Calls],
    *,
    before: Callable[[], object] | None = None,
    note: str = "",
) -> Row:
    """Prepare (which checks the result), measure, and turn a failure into a row."""
    try:
        return Row(str(problem), case, measure(prepare(), before=before), num_bytes, note=note)
    except Exception as error:  # the report says what failed
        return Row(str(problem), case, None, num_bytes, describe(error))


def describe(error: Exception) -> str:
    """One line about an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def dense_cases(inputs: Inputs) -> Iterator[Row]:
    """Our split-K kernel, every backend of torch's attention without a mask, and the masked one."""
    p = inputs.problem
    num_bytes = 2 * p.rows * p.n * p.head_dim * inputs.item

    def ours() -> Calls:
        query, keys, values = inputs.kv(0)
        found = dense_decode(query, keys, values, scale=inputs.scale, backend="triton")
        stock = dense_decode(query, keys, values, scale=inputs.scale, backend="reference")
        wide = (query[:1].double(), keys[:1].double(), values[:1].double())
        exact = dense_decode(*wide, scale=inputs.scale, backend="reference")
        assert_as_exact_as(found[0][:1], stock[0][:1], exact[0], "output")
        return inputs.rotate(lambda i: dense_decode(*inputs.kv(i), scale=inputs.scale, backend="triton"))

    yield run_case(p, "dense_decode", num_bytes, ours)
    for name, call in torch_attention(inputs).items():
        yield run_case(p, name, num_bytes, functools.partial(inputs.rotate, call))


def torch_attention(inputs: Inputs) -> dict[str, Callable[[int], object]]:
    """Torch's attention by backend; `folded` has the query group as query rows: K and V are read once."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    p = inputs.problem
    attention = torch.nn.functional.scaled_dot_product_attention

    def plain(backend: Any, i: int) -> object:
        with sdpa_kernel(backend):
            return attention(*inputs.kv(i), scale=inputs.scale, enable_gqa=p.group > 1)

    def folded(backend: Any, i: int) -> object:
        query, keys, values = inputs.kv(i)
        query = query.reshape(p.batch, p.num_kv_heads, p.group, p.head_dim)
        with sdpa_kernel(backend):
            return attention(query, keys, values, scale=inputs.scale)

    def masked(i: int) -> object:
        query, keys, values = inputs.kv(i)
        return attention(query, keys, values, attn_mask=mask, scale=inputs.scale, enable_gqa=p.group > 1)

    calls: dict[str, Callable[[int], object]] = {}
    if inputs.device != "cuda":
        backends = {"math": SDPBackend.MATH}
    else:
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    for name, backend in backends.items():
        calls[f"sdpa {name}"] = functools.partial(plain, backend)
        if p.group > 1:
            calls[f"sdpa {name} folded"] = functools.partial(folded, backend)
    mask = torch.ones(1, 1, 1, p.n, dtype=torch.bool, device=inputs.device)
    calls["masked sdpa"] = masked
    return calls


def sparse_cases(inputs: Inputs) -> Iterator[Row]:
    """Attention over given sets."""
    p = inputs.problem
    count = torch.full((p.batch, p.num_kv_heads), p.kept, dtype=torch.int32, device=inputs.device)

    def call(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = inputs.indices[i % len(inputs.indices)]
        return sparse_decode(*inputs.kv(i), indices, count=count, scale=inputs.scale, backend="triton")

    def prepare() -> Calls:
        query, keys, values = inputs.kv(0)
        indices = inputs.indices[0]
        stock = sparse_decode(query, keys, values, indices, scale=inputs.scale, backend="reference")
        wide = (query.double(), keys.double(), values.double())
        exact = sparse_decode(*wide, indices, scale=inputs.scale, backend="reference")
        assert_as_exact_as(call(0)[0], stock[0], exact[0], "output")
        return inputs.rotate(call, max(len(inputs.keys), len(inputs.indices)))

    yield run_case(p, "sparse_decode", p.rows * p.kept * (2 * p.head_dim * inputs.item + 4), prepare)

"""Correctness of every operator on the device at hand, at random and ragged shapes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch

from prhs_kernels.ops.audit.api import count_dropped, draw_coins
from prhs_kernels.ops.audit.state import StepAudit
from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.merge_state.api import merge_state
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.key_copy import MAX_FP32_FP8, KeyCopy, KeyCopyKind
from prhs_kernels.ops.retrieve.state import RetrievalRule, RetrievalState
from prhs_kernels.ops.spans import candidate_spans, span_mask
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.ops.sparse_decode.reference import kept_indices
from prhs_kernels.ops.window_prefill import reference as prefill_reference
from prhs_kernels.ops.window_prefill.api import window_prefill
from prhs_kernels.testing.tolerances import assert_as_exact_as, sum_of_terms

KINDS = (KeyCopyKind.INT8, KeyCopyKind.FP8, KeyCopyKind.INT4)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One set of compile-time shapes; lengths and heads are drawn."""

    head_dim: int
    group: int
    dtype: str

    def __str__(self) -> str:
        return f"d{self.head_dim}-g{self.group}-{self.dtype}"


SHAPES = [
    Shape(128, 4, "bf16"),
    Shape(128, 4, "fp16"),
    Shape(128, 4, "fp32"),
    Shape(128, 1, "bf16"),
    Shape(32, 2, "bf16"),
    Shape(64, 7, "bf16"),
    Shape(80, 1, "fp16"),
    Shape(96, 3, "bf16"),
    Shape(256, 16, "bf16"),
    Shape(256, 2, "fp32"),
]
TOY_SHAPES = [Shape(64, 2, "fp16"), Shape(80, 1, "fp32")]


def check(shape: Shape, device: str, toy: bool) -> Iterator[tuple[str, str]]:
    """Yield (operator, "" or what is wrong with it); an operator that fails does not stop the others."""
    lengths = [1, 17, 111] if toy else [1, 15, 17, 63, 111, 1000, 4097, 40000]
    for name, run in (
        ("sparse_decode", _sparse),
        ("dense_decode", _dense),
        ("merge_state", _merge),
        ("retrieve", _retrieve),
        ("window_prefill", _prefill),
        ("key copy", _key_copy),
        ("retrieve, key copy", _retrieve_copied),
    ):
        try:
            for length in lengths:
                run(shape, length, device)
            yield name, ""
        except Exception as error:  # whatever it is, it belongs into the report
            yield name, f"length {length}: {type(error).__name__}: {error}".splitlines()[0][:300]
            if "CUDA" in str(error):
                return  # the context is lost


def _inputs(shape: Shape, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    heads = 2

    def draw(count: int, rows: int) -> torch.Tensor:
        drawn = torch.randn(3, count, rows, shape.head_dim, generator=generator, device=device)
        return drawn.to(DTYPES[shape.dtype])

    return draw(heads * shape.group, 1), draw(heads, length), draw(heads, length)


def _spans(length: int, device: str) -> torch.Tensor:
    used = torch.tensor([length, (length + 1) // 2, length - length // 7], device=device)
    padding = torch.tensor([0, length // 5, 0], device=device)
    return candidate_spans(used, padding, num_sinks=4, num_local=32, window_start=used // 4)


State = tuple[torch.Tensor, torch.Tensor]  # output and lse


def _compare(found: State, stock: State, exact: State, terms: float) -> None:
    assert_as_exact_as(found[0], stock[0], exact[0], "output")
    assert_as_exact_as(found[1], stock[1], exact[1], "lse", terms)


def _sparse(shape: Shape, length: int, device: str) -> None:
    query, keys, values = _inputs(shape, length, device)
    scale = shape.head_dim**-0.5
    kept = torch.rand(keys.shape[:3], generator=torch.Generator(device).manual_seed(1), device=device) < 0.3
    kept[0, 0], kept[1, 0] = False, True
    indices, count = kept_indices(kept)
    stock = sparse_decode(query, keys, values, indices, scale=scale, backend="reference")
    wide = (query.double(), keys.double(), values.double())
    exact = sparse_decode(*wide, indices, scale=scale, backend="reference")
    terms = sum_of_terms(query, keys, scale)
    for cache in (keys, values):
        cache[~kept] = torch.nan
    indices = indices.masked_fill(indices < 0, 2**30).int()
    found = sparse_decode(query, keys, values, indices, count=count.int(), scale=scale, backend="triton")
    _compare(found, stock, exact, terms)


def _dense(shape: Shape, length: int, device: str) -> None:
    query, keys, values = _inputs(shape, length, device)
    scale = shape.head_dim**-0.5
    for spans in (None, _spans(length, device)):
        stock = dense_decode(query, keys, values, spans=spans, scale=scale, backend="reference")
        wide = (query.double(), keys.double(), values.double())
        exact = dense_decode(*wide, spans=spans, scale=scale, backend="reference")
        dirty = [keys.clone(), values.clone()]
        if spans is not None:
            for cache in dirty:
                cache.masked_fill_(~span_mask(spans, length)[:, None, :, None], torch.nan)
        found = dense_decode(query, *dirty, spans=spans, scale=scale, backend="triton")
        _compare(found, stock, exact, sum_of_terms(query, keys, scale))


def _merge(shape: Shape, length: int, device: str) -> None:
    splits = 1 + length % 40
    generator = torch.Generator(device).manual_seed(length)
    output = torch.randn(5, splits, shape.head_dim, generator=generator, device=device)
    lse = 9 * torch.randn(5, splits, generator=generator, device=device)
    lse[0], lse[1, splits // 2] = -torch.inf, -torch.inf
    stock = merge_state(output, lse, backend="reference")
    exact = merge_state(output.double(), lse.double(), backend="reference")
    output[lse.isneginf()] = torch.nan
    largest = float(lse[lse.isfinite()].abs().max())
    _compare(merge_state(output, lse, backend="triton"), stock, exact, largest)


def _retrieve(shape: Shape, length: int, device: str) -> None:
    """Keys whose scores are exact in every precision, so that the sets must be equal; audits too."""
    query, keys, _ = _inputs(shape, length, device)
    generator = torch.Generator(device).manual_seed(length)
    query.zero_()
    query[..., 0] = 1.0
    levels = torch.randint(64, keys.shape[:3], generator=generator, device=device)
    keys[..., 0] = (levels / 16).to(keys.dtype)
    _same_steps(query, keys, None, length, device)


def _key_copy(shape: Shape, length: int, device: str) -> None:
    """Random keys over a wide range: the same bits as PyTorch's rounding."""
    _, keys, _ = _inputs(shape, length, device)
    keys *= torch.logspace(-3, 3, length, device=device)[:, None].to(keys.dtype)
    for kind in KINDS:
        found, wanted = _copies(kind, keys)
        assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8)), f"{kind} codes"
        assert torch.equal(found.scale, wanted.scale), f"{kind} scale"


def _retrieve_copied(shape: Shape, length: int, device: str) -> None:
    """Keys that are codes times a power of two, so that scores are exact with a copy too."""
    query, keys, _ = _inputs(shape, length, device)
    generator = torch.Generator(device).manual_seed(length)
    query.zero_()
    query[..., 0] = 1.0
    for kind in KINDS:
        if kind == KeyCopyKind.FP8 and shape.dtype == "fp32" and shape.head_dim > MAX_FP32_FP8:
            continue
        most = {KeyCopyKind.INT8: 127, KeyCopyKind.FP8: 15, KeyCopyKind.INT4: 7}[kind]
        levels = torch.randint(-most, most + 1, keys.shape, generator=generator, device=device)
        keys = (levels / 32).to(keys.dtype)
        keys[..., 1] = kind.largest / 32
        _same_steps(query, keys, kind, length, device)


def _copies(kind: KeyCopyKind, keys: torch.Tensor) -> tuple[KeyCopy, KeyCopy]:
    """Written by the kernel and by PyTorch."""
    batch, heads, length, head_dim = keys.shape
    found, wanted = (KeyCopy.allocate(kind, batch, heads, length, head_dim, keys.device) for _ in range(2))
    found.write(keys, backend="triton")
    wanted.write(keys, backend="reference")
    return found, wanted


def _same_steps(
    query: torch.Tensor, keys: torch.Tensor, kind: KeyCopyKind | None, length: int, device: str
) -> None:
    """Three steps of both implementations from the same state, half of the units audited."""
    generator = torch.Generator(device).manual_seed(length)
    spans = _spans(length, device)
    count = torch.randint(1 + length // 3, (3, 2), generator=generator, device=device).int()
    rule = RetrievalRule(
        gate=torch.tensor([1, 0], dtype=torch.int32, device=device),
        tau_cos=torch.full((2,), 0.9, device=device),
        block=torch.full((2,), 8, dtype=torch.int32, device=device),
        dilation=torch.tensor([1, 3], dtype=torch.int32, device=device),
        num_local=32,
    )
    group, head_dim = query.shape[1] // 2, query.shape[-1]
    found = RetrievalState.allocate(3, 2, group, head_dim, length + 64, query.dtype, device)
    audit = StepAudit.allocate(0.5, [length], 3, 2, group, device)
    wanted, wanted_audit = copy.deepcopy((found, audit))
    copies = (None, None) if kind is None else _copies(kind, keys)
    both: tuple[tuple[RetrievalState, StepAudit, KeyCopy | None, Backend], ...]
    both = ((found, audit, copies[0], "triton"), (wanted, wanted_audit, copies[1], "reference"))
    for _ in range(3):
        for state, coins, key_copy, backend in both:
            draw_coins(coins, backend=backend)
            retrieve(
                query, keys, spans=spans, budget=count, rule=rule, state=state, scale=1.0, key_copy=key_copy,
                audit=coins.layer(0), backend=backend,
            )  # fmt: skip
            kept = sparse_decode(
                query,
                keys,
                keys,
                state.indices,
                count=state.count,
                spans=spans,
                scale=1.0,
                backend="reference",
            )[1]
            lse = state.lse[None] if kind is None else None
            count_dropped(kept[None], coins, decision=state.decision[None], lse=lse, backend=backend)
            coins.step.add_(1)
        behind = torch.arange(length + 64, device=device) >= wanted.count.unsqueeze(-1)
        for name in ("decision", "count", "anchor_slot"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), f"{name} differs"
        different = (found.indices != wanted.indices) & ~behind
        assert not different.any(), f"{int(different.sum())} of {int((~behind).sum())} indices differ"
        assert torch.equal(audit.coin, wanted_audit.coin), "coins differ"
        for one, other in ((found.lse, wanted.lse), (audit.lse, wanted_audit.lse)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(audit.units, wanted_audit.units), "units differ"
    torch.testing.assert_close(audit.sums, wanted_audit.sums, rtol=1e-4, atol=1e-4)


def _prefill(shape: Shape, length: int, device: str) -> None:
    """Whole prompts up to 1000 tokens, the last rows of longer ones; poison in what no row sees."""
    batch, steps = (3, min(length, 1000)) if length <= 5000 else (1, 150)
    _, keys, values = (tensor[:batch] for tensor in _inputs(shape, length, device))
    query = _inputs(shape, length, device)[0][:batch].expand(-1, -1, steps, -1)
    query = query * torch.linspace(-2, 2, steps, device=device, dtype=query.dtype)[:, None]
    padding = torch.tensor([length // 7, 0, length // 2], device=device)[:batch]
    slots = torch.arange(length - steps, length, device=device)
    for fraction, sliding in ((0.0, None), (0.7, None), (0.4, 1 + length // 2)):
        window = {"window_fraction": fraction, "num_sinks": 4, "num_local": 32, "sliding_window": sliding}
        given = {"scale": shape.head_dim**-0.5, "padding": padding, **window}
        stock = window_prefill(query, keys, values, **given, backend="reference")
        wide = (query.double(), keys.double(), values.double())
        exact = window_prefill(*wide, **given, backend="reference")
        seen = prefill_reference.visible(slots, padding, length, fraction, 4, 32, sliding).any(dim=1)
        dirty = [cache.masked_fill(~seen[:, None, :, None], torch.nan) for cache in (keys, values)]
        found = window_prefill(query, *dirty, **given, backend="triton")
        assert_as_exact_as(found, stock, exact, f"fraction {fraction}, sliding window {sliding}")

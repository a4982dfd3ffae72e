"""Kernels of the decode step outside attention, and a whole step of the engine on kernels.

Run by `test_triton_interpreter.py` in a process of its own, as `check_decode.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prhs_kernels.ops.audit.api import count_dropped, draw_coins, scan_units
from prhs_kernels.ops.audit.state import LayerAudit, ScanScratch, StepAudit
from prhs_kernels.ops.next_token.api import next_token
from prhs_kernels.ops.retrieve import launch
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind
from prhs_kernels.ops.retrieve.state import GateInputs, RetrievalRule, RetrievalScratch, RetrievalState
from prhs_kernels.ops.rms_norm.api import rms_norm, start_norm
from prhs_kernels.ops.rope_append.api import rope_append
from prhs_kernels.ops.silu_mul.api import silu_mul
from prhs_kernels.ops.skinny_linear.api import gated_linear, linear_parts
from prhs_kernels.ops.step_count.api import ChosenSets, step_count
from prhs_kernels.ops.step_plan.api import NO_WINDOW, PlanRule, step_plan
from prhs_kernels.params import DepthParams
from prhs_kernels.runtime.decode import Generation, generate_tokens, left_pad
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.runtime.sampling import Sampling
from prhs_kernels.runtime.static_cache import StaticCache
from prhs_kernels.testing.inputs import random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model
from prhs_kernels.testing.tolerances import assert_as_exact_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 is silently wrong in the interpreter
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 64, 1000])
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm(dtype: torch.dtype, size: int, adds: bool) -> None:
    hidden, weight = drawn(3, size, dtype=dtype, seed=0), drawn(size, dtype=dtype, seed=1)
    residual = 5 * drawn(3, size, dtype=dtype, seed=2) if adds else None
    stock = rms_norm(hidden, weight, 1e-5, residual=residual, backend="reference")
    wide = None if residual is None else residual.double()
    exact = rms_norm(hidden.double(), weight.double(), 1e-5, residual=wide, backend="reference")
    found = rms_norm(hidden, weight, 1e-5, residual=residual, backend="triton")
    assert_as_exact_as(found[0], stock[0], exact[0], "normalised")
    assert torch.equal(found[1], stock[1]), "a sum of two is rounded once, in any order"


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("rows", "size", "width", "splits"), [(1, 64, 128, 1), (5, 192, 640, 2), (32, 64, 384, 3)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_skinny_linear(
    dtype: torch.dtype, rows: int, size: int, width: int, splits: int, biased: bool
) -> None:
    x, weight = drawn(rows, width, dtype=dtype, seed=9), drawn(size, width, dtype=dtype, seed=10)
    bias = drawn(size, dtype=dtype, seed=11) if biased else None
    wide = None if bias is None else bias.double()
    parts = linear_parts(x, weight, bias, splits=splits, backend="triton")
    assert parts.shape == (splits, rows, size)
    stock = linear_parts(x, weight, bias, splits=splits, backend="reference")
    exact = torch.nn.functional.linear(x.double(), weight.double(), wide)
    terms = float((x.double().abs() @ weight.double().abs().T).max())
    assert_as_exact_as(parts.sum(dim=0), stock.sum(dim=0), exact, "sum of the parts", terms)
    stock = gated_linear(x, weight, bias, backend="reference")
    gate, up = exact.chunk(2, dim=-1)
    found = gated_linear(x, weight, bias, backend="triton")
    assert_as_exact_as(found, stock, torch.nn.functional.silu(gate) * up, "gated")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
def test_norm_of_partial_sums(dtype: torch.dtype, adds: bool) -> None:
    parts, weight = drawn(3, 2, 100, dtype=torch.float32, seed=12), drawn(100, dtype=dtype, seed=13)
    residual = drawn(2, 100, dtype=dtype, seed=14) if adds else None
    found, stock = (
        rms_norm(parts, weight, 1e-5, residual=residual, backend=backend)
        for backend in ("triton", "reference")
    )
    exact = rms_norm(stock[1].double(), weight.double(), 1e-5, backend="reference")
    assert_as_exact_as(found[0], stock[0], exact[0], "normalised")
    torch.testing.assert_close(found[1], stock[1])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("rows", "width", "splits"), [(1, 128, 0), (5, 640, 2), (3, 2176, 4)])
def test_a_projection_finishes_a_norm(dtype: torch.dtype, rows: int, width: int, splits: int) -> None:
    """Chunks of a row, the last one partly empty; as exact as the whole norm before the projection."""
    hidden = drawn(rows, width, dtype=dtype, seed=20)
    if splits:
        hidden = drawn(splits, rows, width, dtype=torch.float32, seed=21)
    residual, weight = 9 * drawn(rows, width, dtype=dtype, seed=22), drawn(width, dtype=dtype, seed=23)
    started, total = start_norm(hidden, weight, 1e-5, residual=residual, backend="triton")
    normed, expected = rms_norm(hidden, weight, 1e-5, residual=residual, backend="reference")
    torch.testing.assert_close(total, expected)
    exact, _ = rms_norm(expected.double(), weight.double(), 1e-5, backend="reference")
    factor = drawn(64, width, dtype=dtype, seed=24)
    found = linear_parts(started, factor, splits=2 if width > 128 else 1, backend="triton").sum(dim=0)
    stock = linear_parts(normed, factor, backend="reference").sum(dim=0)
    exact = exact @ factor.double().T
    assert_as_exact_as(found, stock, exact, "projection")
    gate, up = exact.chunk(2, dim=-1)
    found, stock = (
        gated_linear(x, factor, backend=b) for x, b in ((started, "triton"), (normed, "reference"))
    )
    assert_as_exact_as(found, stock, torch.nn.functional.silu(gate) * up, "gated")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1025])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = 3 * drawn(2, 2 * size, dtype=dtype, seed=3)
    stock, exact = (silu_mul(t, backend="reference") for t in (gate_up, gate_up.double()))
    assert_as_exact_as(silu_mul(gate_up, backend="triton"), stock, exact, "activation")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 64), ((7, 1), 80), ((2, 2), 96)])
@pytest.mark.parametrize(("norm", "splits"), [(False, 0), (True, 0), (False, 3), (True, 1)])
def test_rope_append(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, norm: bool, splits: int
) -> None:
    """Rotated queries, what they were before, and a cache of which only one slot per sequence changes."""
    query_heads, kv_heads = heads
    angle = torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 6
    norms = [drawn(head_dim, dtype=dtype, seed=seed) for seed in (6, 7)] if norm else [None, None]
    slots = torch.tensor([4, 2], dtype=torch.int32, device=DEVICE)

    def run(backend: Any, kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        qkv = drawn(2, (query_heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=8).to(kind)
        if splits and kind == dtype:  # in quarters, whose sums are exact in any order
            share = torch.tensor([0.5, 0.25, 0.25] if splits == 3 else [1.0], device=DEVICE)
            qkv = qkv.float() * share[:, None, None]
        room = torch.full((2, 2, 5, kv_heads, head_dim), torch.nan, dtype=kind, device=DEVICE)
        keys, values = room.transpose(2, 3)  # a layout of its own
        tables = {"cos": angle.cos().to(dtype).to(kind), "sin": angle.sin().to(dtype).to(kind)}
        weights = {f"{n}_norm": w if w is None else w.to(kind) for n, w in zip("qk", norms, strict=True)}
        after, before, key = rope_append(
            qkv, keys, values, **tables, slots=slots, **weights, eps=1e-5, backend=backend
        )
        written = torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
        written[0, 4] = written[1, 2] = True
        for cache in (keys, values):
            assert torch.equal(cache.isnan().all(dim=(1, 3)), ~written)
        pick = written[:, None, :, None].expand_as(keys)
        assert torch.equal(keys[pick].view_as(key), key)
        return after, before, keys[pick].view(2, -1), values[pick].view(2, -1)

    found, stock, exact = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for name, *triple in zip(("query", "query before RoPE", "key"), found, stock, exact, strict=False):
        assert_as_exact_as(*triple, name)
    assert torch.equal(found[3], stock[3]), "values are copied"


def gate_inputs(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, kind: str) -> GateInputs:
    """Sequences of 40 and 20 slots; heads of every gate, with budgets, anchors and sets of all sorts."""
    group, kv_heads, capacity = heads[0] // heads[1], heads[1], 48
    state = RetrievalState.allocate(2, kv_heads, group, head_dim, capacity, dtype, DEVICE)
    state.anchor_query.copy_(drawn(*state.anchor_query.shape, dtype=dtype, seed=20))
    state.indices.copy_(torch.arange(capacity))
    numbers = torch.Generator().manual_seed(21)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=numbers).to(DEVICE, torch.int32)

    state.count.copy_(integers(10, capacity + 1, 2, kv_heads))
    state.anchor_slot.copy_(integers(-1, 19, 2, kv_heads))
    rule = RetrievalRule(
        gate=torch.arange(kv_heads, dtype=torch.int32, device=DEVICE) % 3,
        tau_cos=torch.linspace(-1, -0.5, kv_heads, device=DEVICE),
        block=integers(30, 60, kv_heads),
        dilation=integers(0, 2, kv_heads),
        num_local=4,
    )
    spans = torch.tensor([[0, 2, 2, 40], [1, 3, 5, 20]], dtype=torch.int32, device=DEVICE)
    copied = None if kind == "exact" else KeyCopy.allocate(kind, 2, kv_heads, 40, head_dim, DEVICE)
    audit = StepAudit.allocate(0.5, [3], 2, kv_heads, group, DEVICE)
    draw_coins(audit)
    return GateInputs(
        spans=spans,
        budget=integers(5, 40, 2, kv_heads),
        rule=rule,
        state=state,
        scratch=RetrievalScratch.allocate(2, kv_heads, group, 40, DEVICE),
        key_copy=copied,
        audit=audit.layer(0),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["exact", "int4", "int8", "fp8"])
@pytest.mark.parametrize(("heads", "head_dim"), [((12, 6), 64), ((7, 7), 80), ((8, 2), 96)])
def test_the_rotation_decides_as_the_gate_does(
    dtype: torch.dtype, kind: str, heads: tuple[int, int], head_dim: int
) -> None:
    """Bit by bit the state, the work list, the coins and the copy that separate launches leave behind."""
    query_heads, kv_heads = heads
    parts = drawn(2, 2, (query_heads + 2 * kv_heads) * head_dim, dtype=torch.float32, seed=22)
    angles = drawn(2, 2, head_dim // 2, dtype=dtype, seed=23)
    slots = torch.tensor([39, 19], dtype=torch.int32, device=DEVICE)
    found = []
    for fused in (False, True):
        inputs = gate_inputs(heads, head_dim, dtype, kind)
        keys, values = torch.zeros(2, 2, kv_heads, 40, head_dim, dtype=dtype, device=DEVICE)
        query, before, key = rope_append(
            parts, keys, values, cos=angles[:, 0], sin=angles[:, 1], slots=slots,
            gate=inputs if fused else None, backend="triton",
        )  # fmt: skip
        copied, state = inputs.key_copy, inputs.state
        if not fused:
            settings = inputs.spans, inputs.budget, inputs.rule, state, inputs.scratch, inputs.audit
            launch.gate(query, before, *settings, copied is not None)
            if copied is not None:
                copied.write(key, slots, backend="triton")
        listed = int(inputs.scratch.work[0])
        tensors = [getattr(state, field.name) for field in dataclasses.fields(state)]
        tensors += [query, before, key, keys, values]
        tensors += [inputs.scratch.work[:1], inputs.scratch.work[3 : 3 + listed].sort().values]
        if copied is not None:
            tensors += [copied.data.view(torch.uint8), copied.scale]
        found.append(tensors)
    for separate, fused in zip(*found, strict=True):
        assert torch.equal(separate, fused)
    assert set(found[0][4].flatten().tolist()) == {0, 1, 2} or kv_heads == 2, "every decision is there"


def plan_rule(num_layers: int, heads: int, released: bool) -> PlanRule:
    """PSAW, windows of two sizes, budgets that reach from nothing to everything, padding and shifts."""
    layers = torch.arange(num_layers, device=DEVICE)
    ratio = torch.linspace(0, 1.1, num_layers * heads, dtype=torch.float64, device=DEVICE)
    return PlanRule(
        num_sinks=3,
        num_local=5,
        fraction=(layers % 3).double() * 0.31,
        window=torch.where(layers % 2 == 0, NO_WINDOW, 17),
        ratio=ratio.view(num_layers, heads),
        tokens=(layers[:, None] + torch.arange(heads, device=DEVICE)) % 4,
        padding=torch.tensor([0, 11], device=DEVICE),
        shift=(layers % 2) * 4 if released else torch.zeros_like(layers),
    )


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("slot", [11, 12, 16, 47, 300])
def test_step_plan(slot: int, released: bool) -> None:
    rule, at = plan_rule(5, 3, released), torch.tensor([slot], device=DEVICE)
    found, expected = (step_plan(at, rule, backend=backend) for backend in ("triton", "reference"))
    for field in dataclasses.fields(found):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("chosen", [[], [1, 3], [0, 1, 2, 3, 4]])
def test_step_count(chosen: list[int]) -> None:
    """Random decisions over sets of which a part has left the window; one sequence has ended."""
    layers, batch, heads, capacity = 5, 2, 3, 40
    plan = step_plan(torch.tensor([47], device=DEVICE), plan_rule(layers, heads, False), backend="reference")
    generator = torch.Generator().manual_seed(len(chosen))

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=generator)
        return drawn.to(DEVICE, torch.int32)

    sets = None
    if chosen:
        rows = len(chosen) * batch
        state = RetrievalState.allocate(rows, heads, 2, 64, capacity, torch.float32, DEVICE)
        order = torch.rand(rows, heads, 48, generator=generator).argsort(dim=-1)[..., :capacity]
        state.indices.copy_(order.sort(dim=-1).values)
        state.count.copy_(integers(0, capacity + 1, rows, heads))
        state.indices.masked_fill_(torch.arange(capacity, device=DEVICE) >= state.count[..., None], 10**6)
        state.decision.copy_(integers(0, 3, rows, heads))
        place = torch.full((layers,), -1, dtype=torch.int32, device=DEVICE)
        place[chosen] = torch.arange(len(chosen), dtype=torch.int32, device=DEVICE)
        rules = integers(0, 3, len(chosen), heads), integers(1, 30, len(chosen), heads)
        sets = ChosenSets(state, place, *rules, anchor=integers(-1, 48, rows, heads))
    alive = torch.tensor([True, False], device=DEVICE)
    found, expected = (torch.ones(layers, batch, 7, dtype=torch.float64, device=DEVICE) for _ in range(2))
    for _ in range(2):
        for totals, backend in ((found, "triton"), (expected, "reference")):
            step_count(totals, plan, alive, sets, 2, scan_row=44 / 160, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert bool((found[:, 1] == 1).all()) and bool((found[:, 0, 1] > 1).all())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("heads", "group"), [(13, 2), (67, 16), (200, 1)])
def test_coins_and_dropped_mass_of_all_layers(heads: int, group: int, exact: bool) -> None:
    """Random decisions; what must not be counted is NaN, and one sequence has ended."""
    found = StepAudit.allocate(0.4, [5, 2**40 + 1, 6], 2, heads, group, DEVICE)
    expected = copy.deepcopy(found)
    state = RetrievalState.allocate(6, heads, group, 64, 16, torch.float32, DEVICE)
    numbers = torch.Generator().manual_seed(heads)
    alive = torch.tensor([True, False], device=DEVICE)
    for step in range(3):
        kept = torch.randn(3, 2, heads, group, generator=numbers).to(DEVICE)
        more = torch.rand(2, 3, 2, heads, group, generator=numbers).to(DEVICE)
        state.decision.copy_(torch.randint(3, (6, heads), generator=numbers))
        for audit, backend in ((found, "triton"), (expected, "reference")):
            audit.step.fill_(step + 2**33)
            draw_coins(audit, backend=backend)
            counts = (audit.coin == 1) & (state.decision.view_as(audit.coin) != 2)
            audit.lse.copy_((kept + more[0]).masked_fill(~counts[..., None], torch.nan))
            state.lse.copy_((kept + more[1]).view_as(state.lse))
            state.lse.masked_fill_((state.decision != 1)[..., None] | (not exact), torch.nan)
            lse = kept.reshape(3, 2, heads * group, 1)
            decision, whole = state.decision.view_as(audit.coin), state.lse.view_as(audit.lse)
            count_dropped(
                lse, audit, decision=decision, lse=whole if exact else None, alive=alive, backend=backend
            )
        assert torch.equal(found.coin, expected.coin)
    assert torch.equal(found.units, expected.units) and bool((found.units[:, 1] > 0).all())
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-6, atol=0)
    assert bool((found.sums[:, 1] > 0).all()) and bool((found.sums[:, 0] > 0).all()) == exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 1), 64), ((6, 6), 80), ((6, 2), 128)])
@pytest.mark.parametrize("chosen", [False, True])
def test_scan_of_audited_units(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, chosen: bool
) -> None:
    """NaN where nobody was picked, behind the end, and before what dense attention sees; nobody at all."""
    kv_heads, group, n = heads[1], heads[0] // heads[1], 700
    query = drawn(3, heads[0], 1, head_dim, dtype=dtype, seed=31)
    keys = drawn(3, kv_heads, n, head_dim, dtype=dtype, seed=32)
    spans = torch.tensor([[0, 2, 300, 650], [7, 9, 9, 640], [0, 2, 30, 33]], dtype=torch.int32, device=DEVICE)
    visible = torch.tensor([650, 633, 33], dtype=torch.int32, device=DEVICE)
    audit = StepAudit.allocate(0.5, [3], 3, kv_heads, group, DEVICE)
    scratch = ScanScratch.allocate(3, kv_heads, group, query.device)
    scratch.parts.fill_(torch.nan)
    slots = torch.arange(n, device=DEVICE)
    seen = (slots >= (spans[:, 3] - visible)[:, None]) & (slots < spans[:, 3, None])
    sizes = torch.where(torch.arange(kv_heads, device=DEVICE) % 2 == 0, visible[:, None], 5).int()
    for step in range(4):
        audit.step.fill_(step)
        draw_coins(audit)
        audit.coin.mul_(step != 1)
        hidden = keys.masked_fill(~(seen[:, None] & (audit.coin[0] == 1)[..., None])[..., None], torch.nan)
        found = []
        for backend, source in (("triton", hidden), ("reference", keys), ("reference", keys.double())):
            wide = torch.promote_types(source.dtype, torch.float32)
            layer = LayerAudit(audit.coin[0], torch.full_like(audit.lse[0], 7.0, dtype=wide))
            decision = torch.full_like(audit.coin[0], 9)
            scan_units(
                query.to(source.dtype), source, layer, spans=spans, visible=visible, decision=decision,
                scale=0.1, count=sizes if chosen else None, scratch=scratch, backend=backend,
            )  # fmt: skip
            found.append((layer.lse, decision))
        assert torch.equal(found[0][1], found[1][1])
        kept = sizes if chosen else torch.tensor([[352], [633], [5]], device=DEVICE)
        assert torch.equal(found[0][1] == 2, (kept == visible[:, None]).expand(3, kv_heads))
        assert_as_exact_as(found[0][0], found[1][0], found[2][0], "lse")
        assert not scratch.counters.any(), "ready for the next scan"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2048, 2049, 5000])
@pytest.mark.parametrize("stops", [[], [3, 0]])
def test_next_token(dtype: torch.dtype, size: int, stops: list[int]) -> None:
    """The first of equal logits, at the ends of a part too; stop tokens end a row for good."""
    logits = drawn(5, size, dtype=dtype, seed=16)
    logits[1] = -torch.inf
    if size > 2048:
        logits[2, [2047, 2048, size - 1]] = 50.0
        logits[3, size - 1] = 50.0
    found = []
    for backend in ("triton", "reference"):
        token = torch.full((5,), -1, device=DEVICE)
        alive = torch.tensor([True, True, True, False, True], device=DEVICE)
        counters = torch.tensor([6], device=DEVICE), torch.tensor([40], device=DEVICE)
        settings: Any = {"stop_ids": torch.tensor(stops, dtype=torch.long, device=DEVICE), "last_draw": 7}
        for slot in (None, counters[1], counters[1]):
            next_token(logits, token, alive, counters[0], **settings, slot=slot, backend=backend)
        found.append([tensor.tolist() for tensor in (token, alive, *counters)])
    assert found[0] == found[1]
    assert found[0][2:] == [[7], [42]] and found[0][0][1] == 0
    assert found[0][1][1] == (not stops) and not found[0][1][3]


PROMPTS = [random_tokens(length, seed=length) for length in (37, 20)]
CASES = {
    "llama": {"time": {"budget_tokens": 4, "budget_ratio": [0.1, 1.0], "tau_cos": 0.1}},
    "mistral": {"depth": DepthParams(0, 0.3), "time": {"budget_tokens": 3, "gate": [1, 2], "tau_cos": 0.2}},
    "qwen2": {"depth": DepthParams(0, 0.3)},
    "qwen3": {"time": {"budget_tokens": 3, "gate": 2, "tau_cos": 0.1}, "key_copy": KeyCopyKind.INT4},
}


@pytest.mark.parametrize("name", CASES)
def test_engine_gives_the_tokens_of_the_reference_loop(name: str) -> None:
    """fp32, greedy, prompts of different length, one of them ended by a stop token; statistics too."""
    window = {"sliding_window": 20} if name == "mistral" else {}
    model: Any = tiny_model(name, head_dim=64, num_hidden_layers=2, **window).to(DEVICE)
    params = selector_params(model.config, **CASES[name])
    steps = 6
    free, runs = list(generate_tokens(model, PROMPTS, params, max_new_tokens=steps)), []
    settings: dict[str, Any] = {"max_new_tokens": steps, "stop_token_ids": [free[2][1]], "audit": 1.0}
    rows = []
    for backend in ("reference", "triton"):
        runs.append(Generation())
        rows.append(list(generate_tokens(model, PROMPTS, params, run=runs[-1], backend=backend, **settings)))
    assert rows[0] == rows[1] and any(None in row for row in rows[0])
    assert [run.backend for run in runs] == ["reference", "triton"]
    assert runs[1].stats.to_dict() == pytest.approx(runs[0].stats.to_dict(), rel=1e-9, nan_ok=True)
    assert runs[1].stats.units == runs[0].stats.units
    assert runs[1].audit is not None and runs[0].audit is not None
    assert runs[1].audit.units == runs[0].audit.units
    assert runs[1].audit.estimate == pytest.approx(runs[0].audit.estimate, rel=1e-4)


class NoReads(TorchDispatchMode):
    """Refuses operators for whose result, or its shape, the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"), name
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_nothing_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph on a GPU would refuse to record, seen on a CPU as well."""
    window = {"sliding_window": 20} if name == "mistral" else {}
    model: Any = tiny_model(name, head_dim=64, num_hidden_layers=2, **window).to(DEVICE)
    params = selector_params(model.config, **CASES[name])
    run: dict[str, Any] = {"backend": "triton", "use_graph": False, "audit": 0.5}
    with DecodeEngine(model, params, batch_size=2, max_len=60, **run) as engine:
        engine.start(engine.prefill(*left_pad(PROMPTS, 0)))
        engine.step()
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("tolist"))
        with NoReads():
            engine.step()
        with NoReads(), pytest.raises(AssertionError, match="item|_local_scalar_dense"):
            engine.alive.any().item()


@torch.inference_mode()
def test_a_step_on_skinny_projections() -> None:
    """16 bit and sizes in whole blocks: logits as exact as those of the library's matrix products."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_hidden_layers": 2}
    half: Any = tiny_model("qwen2", **sizes).to(DEVICE, torch.float16)
    double: Any = copy.deepcopy(half).double()
    params = selector_params(double.config)
    found = []
    for model, backend in ((half, "triton"), (half, "reference"), (double, "reference")):
        with DecodeEngine(
            model, params, batch_size=2, max_len=20, backend=backend, use_graph=False
        ) as engine:
            engine.fill_random(9, seed=1)
            for cache in (*engine.cache.keys, *engine.cache.values):
                cache.copy_(drawn(*cache.shape, dtype=torch.float16, seed=15))
            engine.step(torch.tensor([5, 77], device=DEVICE))
            found.append(engine.logits)
    assert_as_exact_as(*found, "logits")


def test_sampled_tokens_agree() -> None:
    model: Any = tiny_model("llama", head_dim=64, num_hidden_layers=2).to(DEVICE)
    params = selector_params(model.config, **CASES["llama"])
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
    rows = [
        list(generate_tokens(model, PROMPTS, params, max_new_tokens=5, sampling=sampling, backend=backend))
        for backend in ("reference", "triton")
    ]
    assert rows[0] == rows[1]


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_a_graph_replays_what_the_step_does(name: str) -> None:
    window = {"sliding_window": 20} if name == "mistral" else {}
    model: Any = tiny_model(name, head_dim=64, **window).to(DEVICE)
    params = selector_params(model.config, **CASES[name])
    ids, mask = left_pad(PROMPTS, 0)
    found = []
    for use_graph in (False, True):
        with DecodeEngine(model, params, batch_size=2, max_len=80, use_graph=use_graph) as engine:
            for prompt in (ids, ids.flip(1)):  # the second one in other buffers
                engine.start(engine.prefill(prompt, torch.ones_like(mask)))
                tokens = torch.stack([engine.step().clone() for _ in range(12)])
                found.append((tokens.tolist(), engine.stats()))
    assert found[:2] == found[2:] and found[0] != found[1]


@pytest.mark.skipif(DEVICE == "cpu", reason="asks the allocator of a CUDA device")
def test_the_allocator_confirms_what_is_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released mode holds less by what the buffers say, and the move holds one layer twice, not all."""
    model: Any = tiny_model("llama", head_dim=64, max_position_embeddings=4096).to(DEVICE)
    params = selector_params(model.config, depth=DepthParams(0, 0.05))
    ids = torch.full((2, 3000), 7, device=DEVICE)
    take, peaks = StaticCache.take, []

    def requested(when: str = "current") -> int:
        return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])

    def watched(*arguments: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = requested()
        take(*arguments)
        peaks.append(requested("peak") - before)

    monkeypatch.setattr(StaticCache, "take", watched)
    held: dict[str, tuple[int, int]] = {}
    for mode in ("audited", "released"):
        with DecodeEngine(model, params, batch_size=2, max_len=3100, mode=mode) as engine:
            engine.prefill(ids, torch.ones_like(ids))
            held[mode] = (requested(), engine.resident_bytes)
        layer = 2 * 2 * 2 * 3100 * 64 * 4
        # every layer moved so far also has the room for new tokens
        assert peaks[-1] <= layer + 4 * layer * 100 // 3100 + 65536, mode
    allocated, resident = (held["audited"][i] - held["released"][i] for i in (0, 1))
    assert resident > 0.3 * held["audited"][1]
    assert abs(allocated - resident) <= 4096

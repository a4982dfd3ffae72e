"""The retrieve operator on static buffers against the selector that keeps masks (`selectors.cis`)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prhs_kernels.errors import ResourceError, UsageError
from prhs_kernels.ops.dense_decode.api import dense_decode
from prhs_kernels.ops.merge_state.api import merge_state
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.state import Decision, RetrievalRule, RetrievalState, capacity_for
from prhs_kernels.ops.spans import candidate_spans, span_mask
from prhs_kernels.ops.sparse_decode.api import sparse_decode
from prhs_kernels.ops.sparse_decode.reference import grouped_scores
from prhs_kernels.params import DepthParams, Gate, SelectorParams
from prhs_kernels.selectors import cis
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.testing.inputs import time_params

BATCH, HEADS, GROUP, HEAD_DIM = 2, 2, 2, 16
PADDING = torch.tensor([0, 9])
LAYER = 1  # of two; in the first one PSAW cuts nothing


def parameters(gate: Gate, depth: DepthParams | None) -> SelectorParams:
    time = time_params(
        2,
        HEADS,
        budget_ratio=[0.2, 0.0],
        budget_tokens=[2, 9],
        gate=gate,
        tau_cos=0.6,
        block=5,
        dilation=[1, 2],
    )
    return SelectorParams(
        num_layers=2,
        num_qo_heads=HEADS * GROUP,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        num_sinks=2,
        num_local=4,
        time=time,
        depth=depth,
    )


def walk(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries with and without RoPE, `[batch, heads, steps, head_dim]`: slow drift, a jump now and then."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS * GROUP, steps, HEAD_DIM)
    jump = (torch.rand(shape[:3], generator=generator) < 0.05).cumsum(-1)
    base = torch.randn(*shape[:2], int(jump.max()) + 1, HEAD_DIM, generator=generator)
    kept = base.gather(2, jump.unsqueeze(-1).expand(shape))
    one, other = (3 * kept + 0.5 * torch.randn(shape, generator=generator) for _ in range(2))
    return one, other


@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("depth", [None, DepthParams(start_layer=0, phi=0.4)])
def test_same_sets_as_the_selector(gate: Gate, window: int | None, depth: DepthParams | None) -> None:
    start, steps = 21, 40
    params = parameters(gate, depth)
    assert params.time is not None
    query, query_pre = walk(steps)
    keys = torch.randn(BATCH, HEADS, start + steps, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    rule = RetrievalRule.from_time(params.time, LAYER, params.num_local, "cpu")
    state = RetrievalState.allocate(BATCH, HEADS, GROUP, HEAD_DIM, 64, torch.float32, "cpu")
    carried, seen = None, set()
    for step in range(steps):
        n, now = start + step + 1, slice(step, step + 1)
        rows = Rows(torch.tensor([n - 1]), PADDING, n, window)
        masks = candidates(rows, params, LAYER)
        scores = grouped_scores(query[:, :, now], keys[:, :, :n], 0.3)
        wanted, carried = cis.select(
            query[:, :, now], query_pre[:, :, now], lambda s=scores: s, masks, rows, params, LAYER, carried
        )
        position = rows.positions[:, 0]
        spans = candidate_spans(
            torch.full((BATCH,), n),
            PADDING,
            num_sinks=params.num_sinks,
            num_local=params.num_local,
            sliding_window=window,
            window_start=None if depth is None else params.window_start(LAYER, position),
        )
        assert torch.equal(span_mask(spans, n), masks[:, 0])
        budget = cis.middle_budget(params.time, LAYER, rows.num_visible)[..., 0].int()
        retrieve(
            query[:, :, now],
            keys,
            spans=spans,
            budget=budget,
            rule=rule,
            state=state,
            scale=0.3,
            query_pre=query_pre[:, :, now],
        )
        kept = mask_of(state, spans, n)
        assert torch.equal(kept, wanted.kept[:, :, 0]), f"step {step}"
        assert torch.equal(state.decision == Decision.RETRIEVE, wanted.retrieved[..., 0])
        seen.update(state.decision.flatten().tolist())
    assert {Decision.RETRIEVE, Decision.KEEP_ALL} <= seen
    assert (Decision.SHARE in seen) == (gate != Gate.NEVER)


def mask_of(state: RetrievalState, spans: torch.Tensor, n: int) -> torch.Tensor:
    """What attention over the set reads, `[batch, num_kv_heads, n]` bool; no slot twice, ascending."""
    kept = torch.zeros(BATCH, HEADS, n, dtype=torch.bool)
    for b in range(BATCH):
        for h in range(HEADS):
            slots = state.indices[b, h, : int(state.count[b, h])].long()
            assert (slots.diff() > 0).all()
            kept[b, h, slots] = True
    return kept & span_mask(spans, n)[:, None]


def test_capacity_covers_the_largest_set() -> None:
    assert capacity_for(budget=9, num_sinks=2, num_local=4, dilation=2, block=5) == 32
    for budget in (0, 1, 100):
        assert capacity_for(budget, 4, 32, 1, 8) >= budget + 2 * (budget // 3) + 4 + 32 + 7


def test_no_second_set_without_reanchoring() -> None:
    time = dataclasses.replace(time_params(1, 2), reanchor=False)
    with pytest.raises(UsageError, match="reanchor"):
        RetrievalRule.from_time(time, 0, 4, "cpu")


def decode_inputs() -> dict[str, torch.Tensor]:
    return {
        "query": torch.zeros(2, 4, 1, 64),
        "keys": torch.zeros(2, 2, 9, 64),
        "values": torch.zeros(2, 2, 9, 64),
        "indices": torch.zeros(2, 2, 3, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "query",
            torch.zeros(2, 4, 2, 64),
            r"query: expected shape \[any, any, 1, any\], got \[2, 4, 2, 64\]",
        ),
        ("query", torch.zeros(2, 3, 1, 64), "num_qo_heads = 3 is not a multiple of num_kv_heads = 2"),
        ("keys", torch.zeros(2, 2, 9, 32), r"keys: expected shape \[2, any, any, 64\], got \[2, 2, 9, 32\]"),
        ("keys", torch.zeros(2, 2, 9, 64).half(), "keys: expected dtype torch.float32, got torch.float16"),
        ("values", torch.zeros(2, 2, 8, 64), r"values: expected shape \[2, 2, 9, 64\], got \[2, 2, 8, 64\]"),
        ("values", torch.zeros(2, 2, 9, 64, device="meta"), "values: expected device cpu, got meta"),
        ("indices", torch.zeros(2, 1, 3, dtype=torch.int32), r"indices: expected shape \[2, 2, any\]"),
        ("indices", torch.zeros(2, 2, 3), "indices: expected dtype torch.int32 or torch.int64"),
        ("count", torch.zeros(2, dtype=torch.int32), r"count: expected shape \[2, 2\], got \[2\]"),
        ("spans", torch.zeros(2, 4), "spans: expected dtype torch.int32, got torch.float32"),
        ("scale", 0.0, "scale = 0.0 must be positive"),
        ("backend", "cuda", "backend = 'cuda' must be 'auto', 'reference' or 'triton'"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(name: str, wrong: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sparse_decode(**{"scale": 1.0, **decode_inputs(), name: wrong})  # type: ignore[arg-type]


def test_triton_cannot_be_forced_on_the_cpu() -> None:
    given = decode_inputs()
    with pytest.raises(ResourceError, match="backend 'triton' needs"):
        sparse_decode(**given, scale=1.0, backend="triton")
    del given["indices"]
    with pytest.raises(ResourceError, match="backend 'triton' needs"):
        dense_decode(**given, scale=1.0, backend="triton")
    with pytest.raises(ResourceError, match="backend 'triton' needs"):
        merge_state(torch.zeros(3, 2, 64), torch.zeros(3, 2), backend="triton")


def test_dense_is_torch_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, rows, 64, generator=generator) for heads, rows in ((6, 1), (2, 33), (2, 33))
    )
    output, lse = dense_decode(query, keys, values, scale=0.2)
    stock = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(output, stock)
    halves = [
        dense_decode(query, keys[:, :, part], values[:, :, part], scale=0.2)
        for part in (slice(0, 7), slice(7, 33))
    ]
    parts, masses = (torch.stack(states, dim=3) for states in zip(*halves, strict=True))
    torch.testing.assert_close(merge_state(parts, masses), (output, lse))


def test_dense_ignores_what_it_may_not_see() -> None:
    query, keys, values = (
        torch.ones(1, 2, 1, 8),
        torch.ones(1, 1, 5, 8),
        torch.arange(5.0)[None, None, :, None],
    )
    values = values.repeat(1, 1, 1, 8)
    keys[:, :, 0], values[:, :, 0] = torch.nan, torch.nan
    spans = torch.tensor([[1, 2, 3, 5]], dtype=torch.int32)
    output, _ = dense_decode(query, keys, values, scale=1.0, spans=spans)
    torch.testing.assert_close(output, torch.full_like(output, (1 + 3 + 4) / 3))

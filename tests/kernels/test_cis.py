"""CIS step by step: against the naive implementation on random streams, and one directed test per rule."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch

from prhs_kernels.ops.sparse_decode.reference import grouped_scores
from prhs_kernels.params import DepthParams, Gate, SelectorParams
from prhs_kernels.selectors import cis
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.testing import naive
from prhs_kernels.testing.inputs import time_params

LAYER, HEAD_DIM, SCALE = 1, 8, 1.0


@dataclasses.dataclass
class Stream:
    """Decode steps of one layer: queries that drift, so that some are close to their predecessors.

    query, query_pre: `[batch, num_qo_heads, steps, d]`, unrelated to each other so that no test can confuse
    them; keys: `[batch, num_kv_heads, slots, d]`; padding: `[batch]`. The last `steps` slots are the steps.
    """

    query: torch.Tensor
    query_pre: torch.Tensor
    keys: torch.Tensor
    padding: torch.Tensor
    sliding_window: int | None = None

    @property
    def steps(self) -> int:
        return self.query.shape[2]

    @property
    def first(self) -> int:
        return self.keys.shape[2] - self.steps


def drifting(shape: tuple[int, int, int, int], drift: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    for step in range(1, shape[2]):
        noise[:, :, step] = (1 - drift**2) ** 0.5 * noise[:, :, step - 1] + drift * noise[:, :, step]
    return noise


def make_stream(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    prompt: int = 30,
    steps: int = 20,
    drift: float = 0.4,
    padding: list[int] | None = None,
    sliding_window: int | None = None,
    seed: int = 0,
) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    queries = (batch, heads[0], steps, HEAD_DIM)
    keys = torch.randn(batch, heads[1], prompt + steps, HEAD_DIM, generator=generator, dtype=torch.float64)
    return Stream(
        drifting(queries, drift, generator),
        drifting(queries, drift, generator),
        keys,
        torch.tensor(padding or [0] * batch),
        sliding_window,
    )


def make_params(
    stream: Stream, *, num_sinks: int = 2, num_local: int = 3, depth: DepthParams | None = None, **time: Any
) -> SelectorParams:
    num_qo_heads, num_kv_heads = stream.query.shape[1], stream.keys.shape[1]
    return SelectorParams(
        num_layers=3,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        num_sinks=num_sinks,
        num_local=num_local,
        depth=depth,
        time=time_params(3, num_kv_heads, **time),
    )


def run(stream: Stream, params: SelectorParams, splits: tuple[int, ...] = ()) -> cis.Selection:
    """The selection of all steps, as one run or as several with the state carried from one to the next."""
    state: cis.AnchorState | None = None
    parts: list[cis.Selection] = []
    for start, stop in itertools.pairwise((0, *splits, stream.steps)):
        slots = torch.arange(stream.first + start, stream.first + stop)
        kv_slots = stream.first + stop
        rows = Rows(slots, stream.padding, kv_slots, stream.sliding_window)
        query, keys = stream.query[:, :, start:stop], stream.keys[:, :, :kv_slots]
        selection, state = cis.select(
            query,
            stream.query_pre[:, :, start:stop],
            lambda query=query, keys=keys: grouped_scores(query, keys, SCALE),
            candidates(rows, params, LAYER),
            rows,
            params,
            LAYER,
            state,
        )
        grown = torch.nn.functional.pad(selection.kept, (0, stream.keys.shape[2] - kv_slots))
        parts.append(dataclasses.replace(selection, kept=grown))
    fields = ("kept", "retrieved", "contested", "gated")
    return cis.Selection(*(torch.cat([getattr(p, name) for p in parts], dim=2) for name in fields))


def run_naive(stream: Stream, params: SelectorParams, row: int, head: int) -> list[naive.Step]:
    """The steps of one KV head of one row, in positions."""
    pad, group = int(stream.padding[row]), params.group_size
    heads = slice(head * group, (head + 1) * group)
    anchor: naive.Anchor | None = None
    steps = []
    for index in range(stream.steps):
        t = stream.first + index - pad
        query, query_pre = stream.query[row, heads, index], stream.query_pre[row, heads, index]
        scores = query @ stream.keys[row, head, pad : pad + t + 1].T * SCALE
        allowed = naive.visible(params, LAYER, t, stream.sliding_window)
        seen = min(t + 1, stream.sliding_window or t + 1)
        step, anchor = naive.cis_step(
            params, LAYER, head, t, seen, allowed, query, query_pre, scores, anchor
        )  # fmt: skip
        steps.append(step)
    return steps


def positions(kept: torch.Tensor, padding: int = 0) -> set[int]:
    return set((kept.nonzero().flatten() - padding).tolist())


def assert_equals_naive(stream: Stream, params: SelectorParams) -> list[naive.Step]:
    selection = run(stream, params)
    every = []
    for row, head in itertools.product(range(len(stream.padding)), range(params.num_kv_heads)):
        for index, step in enumerate(run_naive(stream, params, row, head)):
            where = f"row {row} head {head} step {index}"
            assert positions(selection.kept[row, head, index], int(stream.padding[row])) == step.kept, where
            for name in ("retrieved", "contested", "gated"):
                assert bool(getattr(selection, name)[row, head, index]) == getattr(step, name), (where, name)
            every.append(step)
    return every


def random_time(choose: random.Random, heads: int) -> dict[str, Any]:
    def per_head(*values: float) -> list[float]:
        return [choose.choice(values) for _ in range(heads)]

    return {
        "budget_ratio": per_head(0.0, 0.1, 0.3, 0.62, 1.0),
        "budget_tokens": per_head(0, 1, 3, 7),
        "gate": per_head(*Gate),
        "tau_cos": per_head(-1.0, 0.3, 0.8, 0.95),
        "block": per_head(1, 2, 5, 8, 100),
        "dilation": per_head(0, 1, 3),
        "reanchor": choose.random() < 0.5,
    }


@pytest.mark.parametrize("seed", range(24))
def test_random_streams_equal_the_naive_implementation(seed: int) -> None:
    """Heads of every kind side by side, with PSAW, a sliding window and left padding thrown in."""
    choose = random.Random(seed)
    heads = choose.choice([(4, 4), (4, 2), (6, 2), (3, 1)])
    stream = make_stream(
        batch=3,
        heads=heads,
        prompt=choose.choice([1, 8, 31]),
        padding=[0, *choose.choices([0, 5, 7], k=2)] if seed % 3 else None,
        drift=choose.choice([0.1, 0.4, 0.7]),
        sliding_window=choose.choice([None, None, 12]),
        seed=seed,
    )
    stream.padding.clamp_(max=stream.first)
    params = make_params(
        stream,
        depth=choose.choice([None, DepthParams(0, 0.3), DepthParams(0, 0.05, 2.0)]),
        num_sinks=choose.choice([0, 1, 4]),
        num_local=choose.choice([1, 3, 6]),
        **random_time(choose, heads[1]),
    )
    assert_equals_naive(stream, params)


def test_the_random_streams_reach_every_branch() -> None:
    """A comparison in which nothing is ever reused would prove nothing."""
    stream = make_stream(heads=(4, 2), steps=40, drift=0.25, seed=5)
    steps = assert_equals_naive(
        stream,
        make_params(stream, budget_tokens=4, gate=[Gate.POST_ROPE, Gate.PRE_ROPE], tau_cos=0.85, block=4),
    )
    reused = [s for s in steps if s.contested and not s.retrieved]
    refused = [s for s in steps if s.gated and s.retrieved]
    forced = [s for s in steps if s.retrieved and not s.gated]
    assert min(len(reused), len(refused), len(forced)) >= 10


@pytest.mark.parametrize("reanchor", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 14])
def test_carried_state_equals_one_run_at_every_split(reanchor: bool, sliding_window: int | None) -> None:
    stream = make_stream(steps=14, drift=0.3, padding=[0, 6], sliding_window=sliding_window, seed=2)
    params = make_params(
        stream,
        budget_tokens=[4, 3],
        gate=[Gate.POST_ROPE, Gate.PRE_ROPE],
        tau_cos=0.8,
        block=5,
        reanchor=reanchor,
        depth=DepthParams(0, 0.4),
    )
    whole = run(stream, params)
    assert whole.gated.any() and (whole.contested & ~whole.retrieved).any()
    every_step = tuple(range(1, stream.steps))
    for splits in [*((at,) for at in every_step), (3, 4, 9), every_step]:
        parts = run(stream, params, splits)
        for name in ("kept", "retrieved", "contested", "gated"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), (splits, name)


def test_padded_rows_equal_the_same_rows_alone() -> None:
    stream = make_stream(batch=3, padding=[0, 4, 11], seed=4)
    params = make_params(stream, budget_ratio=0.2, tau_cos=0.7, depth=DepthParams(0, 0.3))
    together = run(stream, params)
    for row, pad in enumerate([0, 4, 11]):
        alone = Stream(
            stream.query[row : row + 1],
            stream.query_pre[row : row + 1],
            stream.keys[row : row + 1, :, pad:],
            torch.tensor([0]),
        )
        single = run(alone, params)
        assert torch.equal(together.kept[row, ..., pad:], single.kept[0])
        assert not together.kept[row, ..., :pad].any(), "padding is not a position"
        assert torch.equal(together.retrieved[row], single.retrieved[0])


def constant(stream: Stream) -> Stream:
    """The same query at every step: every cosine is 1."""
    return dataclasses.replace(
        stream,
        query=stream.query[:, :, :1].expand_as(stream.query).clone(),
        query_pre=stream.query_pre[:, :, :1].expand_as(stream.query).clone(),
    )


def test_local_grows_until_the_next_anchor() -> None:
    """Positions that leave the sliding local window would otherwise be in neither set."""
    stream = constant(make_stream(batch=1, heads=(1, 1), prompt=30, steps=9))
    selection = run(stream, make_params(stream, budget_tokens=2, num_local=3, block=4, dilation=0))
    for index in range(9):
        anchor, t = 30 + index // 4 * 4, 30 + index
        kept = positions(selection.kept[0, 0, index])
        assert set(range(anchor - 2, t + 1)) <= kept
        assert len(kept) == 2 + 2 + 3 + (t - anchor), "sinks, two chosen, local and what it has grown by"


@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks_expire(block: int) -> None:
    stream = constant(make_stream(batch=1, steps=11))
    selection = run(stream, make_params(stream, budget_tokens=3, block=block))
    expected = [index % block == 0 for index in range(11)]
    assert selection.retrieved[0, 0].tolist() == expected
    assert selection.gated[0, 0].tolist() == [not anchor for anchor in expected]
    assert selection.contested.all()


@pytest.mark.parametrize("reanchor", [True, False])
def test_a_retrieval_inside_a_block_starts_a_new_one_only_if_asked(reanchor: bool) -> None:
    stream = constant(make_stream(batch=1, heads=(2, 1), steps=8))
    other = -stream.query[:, :, 0]
    stream.query[:, :, 2], stream.query[:, :, 3] = other, other
    params = make_params(stream, budget_tokens=3, dilation=0, num_local=1, block=5, reanchor=reanchor)
    selection = run(stream, params)
    # steps           0     1      2     3      4      5      6      7
    if reanchor:  # blocks from 0, 2 and, as the query turns back, 4
        assert selection.retrieved[0, 0].tolist() == [True, False, True, False, True, False, False, False]
    else:  # the anchor stays 0 until its block of 5 ends
        assert selection.retrieved[0, 0].tolist() == [True, False, True, True, False, True, False, False]
        first = positions(selection.kept[0, 0, 0])
        assert first <= positions(selection.kept[0, 0, 4]), "step 4 reuses the set of step 0"
        assert not first <= positions(selection.kept[0, 0, 2])
        # local has grown from step 0's anchor, not from step 3's retrieval
        assert positions(selection.kept[0, 0, 4]) - first == set(range(31, 35))


@pytest.mark.parametrize(
    ("gate", "shared"), [(Gate.NEVER, False), (Gate.POST_ROPE, False), (Gate.PRE_ROPE, True)]
)
def test_the_gate_says_which_cosine(gate: Gate, shared: bool) -> None:
    stream = make_stream(batch=1, drift=1.0, steps=6)
    stream.query_pre = constant(stream).query_pre
    selection = run(stream, make_params(stream, budget_tokens=3, gate=gate, tau_cos=0.99))
    assert selection.retrieved[0, 0].tolist() == [True] + 5 * [not shared]
    assert selection.gated[0, 0, 1:].all() == (gate != Gate.NEVER)


def test_the_threshold_is_strict_and_one_means_never() -> None:
    """On unit vectors, whose cosines are exactly 1 and 0."""
    stream = make_stream(batch=1, steps=6)
    stream.query = torch.eye(HEAD_DIM, dtype=torch.float64)[0].expand_as(stream.query).clone()
    assert run(stream, make_params(stream, budget_tokens=3, tau_cos=1.0)).retrieved.all()
    assert not run(stream, make_params(stream, budget_tokens=3, tau_cos=0.999)).retrieved[:, :, 1:].any()
    stream.query[:, :, 3] = stream.query[:, :, 3].roll(1, dims=-1)
    for tau, shared in ((0.0, False), (-1e-6, True)):
        params = make_params(stream, budget_tokens=3, tau_cos=tau, reanchor=False)
        assert run(stream, params).retrieved[0, 0].tolist() == [True, False, False, not shared, False, False]


def test_the_scale_of_queries_does_not_matter_to_the_gate() -> None:
    stream = constant(make_stream(batch=1, steps=6))
    stream.query *= torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    assert not run(stream, make_params(stream, budget_tokens=3, tau_cos=0.999)).retrieved[:, :, 1:].any()


def test_one_head_of_the_group_can_refuse() -> None:
    stream = constant(make_stream(batch=1, heads=(6, 2), steps=4))
    stream.query[0, 4, 2] *= -1  # the second KV head's group
    selection = run(stream, make_params(stream, budget_tokens=3, reanchor=False))
    assert selection.retrieved[0].tolist() == [[True, False, False, False], [True, False, True, False]]


def test_importance_uses_the_normaliser_of_sinks_and_local_too() -> None:
    """A head that rests on a sink must not outvote one that needs the middle.

    Position 0 is a sink, 4 local. Head 0 has 0.98 on the sink and its rest on position 2; head 1 wants 3.
    Among the middle positions alone head 0 would weigh 2 by about 0.9, head 1 position 3 by about 0.8.
    """
    logits = torch.tensor([[4.0, -9.0, 0.0, -2.2, -9.0], [0.0, -9.0, -1.4, 0.0, -9.0]], dtype=torch.float64)
    keys = torch.zeros(1, 1, 5, HEAD_DIM, dtype=torch.float64)
    keys[0, 0, :, :2] = logits.T
    query = torch.eye(2, HEAD_DIM, dtype=torch.float64).view(1, 2, 1, HEAD_DIM)
    stream = Stream(query, query, keys, torch.tensor([0]))
    params = make_params(stream, budget_tokens=1, num_sinks=1, num_local=1, dilation=0)
    assert positions(run(stream, params).kept[0, 0, 0]) == {0, 3, 4}
    middle_only = logits[:, 1:4].softmax(-1).sum(0)
    assert int(middle_only.argmax()) == 1, "the case would not tell the two apart"


def test_dense_heads_and_covered_budgets_keep_everything_without_scoring() -> None:
    stream = make_stream(batch=1, prompt=5, steps=4)

    def never() -> torch.Tensor:
        raise AssertionError("nothing has to be chosen, so nothing may be scanned")

    params = make_params(stream, budget_ratio=[1.0, 0.0], budget_tokens=[0, 9])
    rows = Rows(torch.arange(5, 9), stream.padding, 9)
    allowed = candidates(rows, params, LAYER)
    selection, state = cis.select(
        stream.query, stream.query_pre, never, allowed, rows, params, LAYER, None
    )  # fmt: skip
    assert torch.equal(selection.kept, allowed[:, None].expand(-1, 2, -1, -1))
    assert not (selection.retrieved | selection.contested | selection.gated).any()
    assert (state.slot == -1).all()


def test_a_reused_step_scans_nothing() -> None:
    stream = constant(make_stream(batch=1, steps=2))
    params = make_params(stream, budget_tokens=3)
    state, asked = None, []
    for index in range(2):
        rows = Rows(torch.tensor([30 + index]), stream.padding, 31 + index)
        query = stream.query[:, :, index : index + 1]

        def scores(index: int = index, query: torch.Tensor = query) -> torch.Tensor:
            asked.append(index)
            return grouped_scores(query, stream.keys[:, :, : 31 + index], SCALE)

        allowed = candidates(rows, params, LAYER)
        _, state = cis.select(query, query, scores, allowed, rows, params, LAYER, state)
    assert asked == [0]


@pytest.mark.parametrize("budget", [0, 1, 25])
def test_smallest_and_largest_budgets(budget: int) -> None:
    """No middle position at all, one, and one less than there are."""
    stream = make_stream(batch=1, heads=(2, 1), prompt=30, steps=1)
    selection = run(stream, make_params(stream, budget_tokens=budget, dilation=0))
    assert len(positions(selection.kept[0, 0, 0])) == 2 + 3 + budget
    assert selection.contested.all()


def test_kept_sets_are_nested_in_the_budget() -> None:
    """With gates off every step is an anchor: the conformal dial needs its sets nested, open loop."""
    stream = make_stream(batch=1, steps=6, seed=9)
    previous = torch.zeros(1, 2, 6, stream.keys.shape[2], dtype=torch.bool)
    for budget in range(40):
        kept = run(stream, make_params(stream, budget_tokens=budget, gate=Gate.NEVER, dilation=2)).kept
        assert (kept | ~previous).all(), budget
        previous = kept

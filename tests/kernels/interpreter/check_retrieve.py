"""Retrieval kernels against the plain PyTorch step: in the interpreter without a GPU, compiled with one.

Importances are compared where they can be: keys are built so that no two positions come closer than the
error of fp32, except for exact ties, which are made on purpose.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from prhs_kernels.bench.timing import capture
from prhs_kernels.errors import UsageError
from prhs_kernels.ops.audit.api import draw_coins
from prhs_kernels.ops.audit.state import StepAudit
from prhs_kernels.ops.retrieve import reference
from prhs_kernels.ops.retrieve.api import retrieve
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, KeyCopyKind
from prhs_kernels.ops.retrieve.state import Decision, RetrievalRule, RetrievalScratch, RetrievalState
from prhs_kernels.ops.spans import candidate_spans, span_mask
from prhs_kernels.ops.sparse_decode.api import sparse_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LENGTHS = [1, 15, 17, 63, 111, 1000]
BATCH = 2


def rule(
    num_kv_heads: int,
    *,
    gate: int = 1,
    tau: float = 0.9,
    block: int = 8,
    dilation: int = 1,
    num_local: int = 3,
):
    def table(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_kv_heads,), value, dtype=dtype, device=DEVICE)

    i = torch.int32
    return RetrievalRule(
        table(gate, i), table(tau, torch.float32), table(block, i), table(dilation, i), num_local
    )


def separated(length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, levels: int = 0):
    """Query and keys whose scores are exact in every precision and, with `levels`, often tied.

    The query of every head is a unit vector times a power of two and the keys hold multiples of 1/64 along
    it, so that scores are exact; importances differ by at least exp(1/64) between levels.
    """
    generator = torch.Generator().manual_seed(length + head_dim)
    query = torch.zeros(BATCH, heads[0], 1, head_dim)
    query[..., 0] = 1.0
    keys = torch.randn(BATCH, heads[1], length, head_dim, generator=generator)
    if levels:
        steps = torch.randint(levels, (BATCH, heads[1], length), generator=generator)
    else:
        steps = torch.stack([torch.randperm(length, generator=generator) for _ in range(BATCH * heads[1])])
        steps = steps.view(BATCH, heads[1], length)
    keys[..., 0] = steps / 64
    return query.to(DEVICE, dtype), keys.to(DEVICE, dtype)


def twins(state: RetrievalState) -> tuple[RetrievalState, RetrievalState]:
    return copy.deepcopy(state), copy.deepcopy(state)


def new_state(query: torch.Tensor, keys: torch.Tensor, capacity: int) -> RetrievalState:
    batch, num_kv_heads, _, head_dim = keys.shape
    state = RetrievalState.allocate(
        batch, num_kv_heads, query.shape[1] // num_kv_heads, head_dim, capacity, query.dtype, DEVICE
    )
    state.indices.fill_(10**8)  # what nobody wrote must not be used
    return state


def poisoned(keys: torch.Tensor, more: int = 37) -> RetrievalScratch:
    """Scratch for `more` slots, full of NaN, and of keys that would win."""
    batch, num_kv_heads, n, _ = keys.shape
    scratch = RetrievalScratch.allocate(batch, num_kv_heads, GROUP, n + more, DEVICE)
    for floats in (scratch.scores, scratch.chunk_max, scratch.chunk_sum):
        floats.fill_(torch.nan)
    scratch.weights.fill_(2**31 - 1)
    scratch.words.fill_(-1)
    scratch.lists.fill_(10**8)
    scratch.work[3:] = 10**8
    return scratch


GROUP = 2


def same(one: RetrievalState, other: RetrievalState) -> None:
    assert torch.equal(one.decision, other.decision)
    assert torch.equal(one.count, other.count)
    assert torch.equal(one.anchor_slot, other.anchor_slot)
    behind = torch.arange(one.indices.shape[-1], device=DEVICE) >= one.count.unsqueeze(-1)
    assert torch.equal(one.indices.masked_fill(behind, -1), other.indices.masked_fill(behind, -1))
    assert torch.equal(one.anchor_query, other.anchor_query)
    torch.testing.assert_close(one.lse, other.lse, rtol=1e-5, atol=1e-5)


def both(query, keys, spans, budget, rule_, start, scratch, query_pre=None, key_copy=None, audit=None):
    found, expected = twins(start)
    given = {"spans": spans, "budget": budget, "rule": rule_, "scale": 1.0, "query_pre": query_pre}
    given["key_copy"] = key_copy
    other = copy.deepcopy(audit)
    hidden = keys.masked_fill(~span_mask(spans, keys.shape[2])[:, None, :, None], torch.nan)
    if key_copy is not None and audit is None:
        hidden.fill_(torch.nan)
    retrieve(query, hidden, **given, state=found, scratch=scratch, audit=audit, backend="triton")
    clean = given if key_copy is None else {**given, "key_copy": without_nan(key_copy)}
    retrieve(query, keys, **clean, state=expected, audit=other, backend="reference")
    same(found, expected)
    if audit is not None:
        torch.testing.assert_close(audit.lse, other.lse, rtol=1e-5, atol=1e-5, equal_nan=True)
    for counters in (scratch.work[:1], scratch.tally):
        assert not counters.any(), "ready for the next step"
    return found


def without_nan(key_copy: KeyCopy) -> KeyCopy:
    return dataclasses.replace(key_copy, scale=key_copy.scale.nan_to_num())


@pytest.mark.parametrize(
    ("length", "dtype"),
    [*((length, DTYPES[0]) for length in LENGTHS), *((111, dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_first_step_retrieves_the_top(length: int, dtype: torch.dtype) -> None:
    """k of 0, 1, some, all; sinks and local; left padding; a window that cuts off old positions."""
    query, keys = separated(length, (2 * GROUP, 2), 64 if length % 2 else 80, dtype)
    scratch = poisoned(keys)
    used = torch.tensor([length, (length + 1) // 2], device=DEVICE)
    padding = torch.tensor([0, length // 5], device=DEVICE)
    spans = [
        candidate_spans(used, padding, num_sinks=2),
        candidate_spans(used, padding, num_sinks=2, num_local=3, window_start=used // 3),
    ]
    for span in spans:
        for budget in ([0, 1], [length // 2, 5], [length, length // 4]):
            for dilation in (0, 2):
                wanted = torch.tensor([budget, budget[::-1]], dtype=torch.int32, device=DEVICE)
                state = new_state(query, keys, length + 8)
                found = both(query, keys, span, wanted, rule(2, dilation=dilation), state, scratch)
                assert (found.decision != Decision.SHARE).all()


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_ties_go_to_the_oldest(levels: int) -> None:
    query, keys = separated(300, (2 * GROUP, 2), 64, torch.float32, levels)
    scratch = poisoned(keys)
    spans = candidate_spans(torch.tensor([300, 300]), torch.tensor([0, 17]), num_sinks=2).to(DEVICE)
    for budget in ([1, 2], [50, 149], [3, 270]):
        wanted = torch.tensor([budget, budget[::-1]], dtype=torch.int32, device=DEVICE)
        both(query, keys, spans, wanted, rule(2, dilation=1), new_state(query, keys, 310), scratch)


def test_scores_that_underflow_are_tied_at_zero() -> None:
    query, keys = separated(200, (2 * GROUP, 2), 64, torch.float32)
    # all but two importances are 0 in fp32; none is denormal, which a GPU's exponential rounds to 0
    query[..., 0] = 4096.0
    spans = candidate_spans(torch.tensor([200, 200]), torch.tensor([0, 0]), num_sinks=1).to(DEVICE)
    wanted = torch.tensor([[60, 100], [33, 2]], dtype=torch.int32, device=DEVICE)
    both(query, keys, spans, wanted, rule(2), new_state(query, keys, 310), poisoned(keys))


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_a_walk_of_steps(gate: int) -> None:
    """Sharing, retrieving after a drift, at the end of a block, and keeping everything, over one cache."""
    start, steps, heads = 40, 14, (2 * GROUP, 2)
    query, keys = separated(start + steps, heads, 64, torch.float32)
    generator = torch.Generator().manual_seed(gate)
    rules = rule(2, gate=gate, tau=0.95, block=5, num_local=3)
    state, scratch = new_state(query, keys, 40), poisoned(keys)
    padding = torch.tensor([0, 20], device=DEVICE)
    seen = set()
    for step in range(steps):
        used = torch.full((BATCH,), start + step + 1, device=DEVICE)
        spans = candidate_spans(used, padding, num_sinks=2, num_local=3, window_start=(used - padding) // 8)
        turned = query.clone()
        if step % 4 == 3:
            turned[0, 0, 0, 1] = 1.0  # 45 degrees, one query head of one KV head of one sequence
        drift = torch.randn(query.shape, generator=generator).to(DEVICE) * 1e-3
        # once the budget covers everything in between: the set from before must not come back
        first = 99 if step == 5 else 12
        budget = torch.tensor([[first, 12], [9, 24]], dtype=torch.int32, device=DEVICE)
        # the scores follow `turned`; what the gate compares before RoPE is something else
        state = both(turned, keys, spans, budget, rules, state, scratch, query_pre=query + drift)
        seen.update(state.decision.flatten().tolist())
    assert Decision.RETRIEVE in seen and Decision.KEEP_ALL in seen and (Decision.SHARE in seen) == (gate != 0)


def test_a_full_set_retrieves_instead_of_growing() -> None:
    query, keys = separated(60, (2 * GROUP, 2), 64, torch.float32)
    rules = rule(2, tau=-1.0, block=100, dilation=0, num_local=2)
    state, scratch = new_state(query, keys, 2 + 2 + 5 + 3), poisoned(keys)
    budget = torch.full((BATCH, 2), 5, dtype=torch.int32, device=DEVICE)
    decisions = []
    for used in range(50, 60):
        spans = candidate_spans(torch.full((BATCH,), used), torch.zeros(BATCH), num_sinks=2).to(DEVICE)
        state = both(query, keys, spans, budget, rules, state, scratch)
        decisions.append(int(state.decision[0, 0]))
    assert decisions == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_scores_choose_the_same_up_to_rounding(group: int, dtype: torch.dtype) -> None:
    """Against importances in float64: a position may only be swapped for one that is as good to fp32."""
    generator = torch.Generator().manual_seed(group)
    query = torch.randn(1, group, 1, 128, generator=generator).to(DEVICE, dtype)
    keys = torch.randn(1, 1, 700, 128, generator=generator).to(DEVICE, dtype)
    spans = torch.tensor([[0, 2, 2, 700]], dtype=torch.int32, device=DEVICE)
    state = new_state(query, keys, 200)
    budget = torch.tensor([[64]], dtype=torch.int32, device=DEVICE)
    rules = rule(1, dilation=0)
    scale = 128**-0.5
    retrieve(query, keys, spans=spans, budget=budget, rule=rules, state=state, scale=scale, backend="triton")
    scores = (query[0, :, 0].double() @ keys[0, 0].double().T) * scale
    weights = reference.importance(scores, torch.ones(700, dtype=torch.bool, device=DEVICE))
    chosen = state.indices[0, 0, : int(state.count)].long()
    middle = chosen[2:-3]
    assert len(middle) == 64 and (middle.diff() > 0).all()
    others = torch.ones(700, dtype=torch.bool, device=DEVICE)
    others[:2], others[-3:], others[middle] = False, False, False
    # an fp32 score of size s is off by some eps * sum of its terms, and the exponential passes that on
    slack = 1 + 16 * torch.finfo(torch.float32).eps * float(scores.abs().max()) * 128**0.5
    assert float(weights[middle].min()) * slack >= float(weights[others].max())
    torch.testing.assert_close(state.lse[0, 0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


LONG = 5000  # slots from which on candidates are counted by bins


def configured(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Other launch shapes of the choice."""
    from prhs_kernels.ops.retrieve import launch
    from prhs_kernels.ops.retrieve.config import choose_config

    monkeypatch.setattr(
        launch, "choose_config", lambda *args: dataclasses.replace(choose_config(*args), **changes)
    )


def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short blocks, so that short rows take several, more than one program, and a sample."""
    configured(monkeypatch, list_len=64, sample=64, num_warps=1, programs=7)


@pytest.mark.parametrize("more", [37, LONG])
def test_a_list_that_does_not_fit_a_block(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven levels are 360 ties each."""
    shortened(monkeypatch)
    query, keys = separated(2500, (2 * GROUP, 2), 64, torch.float32, levels=7)
    spans = candidate_spans(torch.tensor([2500, 900]), torch.tensor([0, 17]), num_sinks=2).to(DEVICE)
    budget = torch.tensor([[100, 300], [1, 500]], dtype=torch.int32, device=DEVICE)
    both(query, keys, spans, budget, rule(2, dilation=2), new_state(query, keys, 2500), poisoned(keys, more))


def test_a_sample_that_misleads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sampled positions are among the best, so the first bound is too high; the list is made again."""
    shortened(monkeypatch)
    query, keys = separated(1000, (2 * GROUP, 2), 64, torch.float32)
    size, drawn = 1000 - 2 - 3, torch.arange(64)
    stride = -(-size // 64)
    sampled = 2 + drawn * stride + ((drawn * 40503) >> 5) % stride
    keys[:, :, sampled[sampled < 1000].to(DEVICE), 0] += 16.0
    spans = candidate_spans(torch.tensor([1000, 1000]), torch.tensor([0, 0]), num_sinks=2).to(DEVICE)
    budget = torch.tensor([[100, 300], [40, 500]], dtype=torch.int32, device=DEVICE)
    both(query, keys, spans, budget, rule(2, dilation=2), new_state(query, keys, 1000), poisoned(keys))


def listed_afresh(scratch: RetrievalScratch) -> list[bool]:
    """Of every row whether the last retrieval made an ascending list, which lies where its scores were."""
    first = scratch.scores.view(torch.int32)[:, 0, :2]
    return ((first[:, 0] >= 0) & (first[:, 0] < first[:, 1]) & (first[:, 1] < scratch.max_len)).tolist()


@pytest.mark.parametrize(("length", "levels"), [(120, 0), (2100, 0), (1100, 60)])
def test_no_guess_of_a_threshold_changes_a_set(
    length: int, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, right, of another budget and window, too high, too low, after a reset; ties at thresholds."""
    configured(
        monkeypatch,
        listed=1,
        block_n=512,
        programs=12,
        list_len=64 if length == 120 else 128,
        sample=64,
        num_warps=1,
    )
    query, keys = separated(length, (2 * GROUP, 2), 64, torch.float32, levels)
    state, scratch = new_state(query, keys, length), poisoned(keys, LONG)
    used = torch.tensor([length, length - 9], device=DEVICE)
    right = [levels > 0] * 4  # the oldest of ties are found in an ascending list

    def chosen(kept: int, window: int = 2) -> list[bool]:
        """With budgets of up to `kept`; whose list was made afresh."""
        nonlocal state
        start = torch.full((BATCH,), window, device=DEVICE)
        spans = candidate_spans(used, used * 0, num_sinks=2, num_local=3, window_start=start)
        budget = torch.tensor([[kept, kept - 1], [kept // 2, kept - 2]], dtype=torch.int32, device=DEVICE)
        state = both(query, keys, spans, budget, rule(2, gate=0, dilation=2), state, scratch)
        return listed_afresh(scratch)

    assert chosen(20) == [True] * 4 and (state.guess > 0).all()
    assert chosen(20, window=3) == right, "nearly the same scores again"
    for kept in (8, length // 4, 20):
        chosen(kept, window=kept % 5 + 2)
    for guess in (1, 2**31 - 1):
        state.guess.fill_(guess)
        assert chosen(20) == [True] * 4
    assert chosen(20) == right
    keys[:, :, length // 2, 0] += 40.0  # one position outweighs all: nothing else reaches the guess
    assert chosen(20) == [True] * 4
    state.reset()
    assert not state.guess.any()


@pytest.mark.parametrize("more", [37, LONG])
def test_a_list_whose_positions_are_read_again(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of this length leave no registers for positions; made afresh, then listed while weighed."""
    configured(monkeypatch, listed=1, list_len=8192)
    query, keys = separated(1000, (2 * GROUP, 2), 64, torch.float32)
    state, scratch = new_state(query, keys, 400), poisoned(keys, more)
    spans = candidate_spans(torch.tensor([1000, 900]), torch.tensor([0, 17]), num_sinks=2).to(DEVICE)
    budget = torch.tensor([[20, 30], [9, 25]], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        state = both(query, keys, spans, budget, rule(2, gate=0, dilation=2), state, scratch)
    assert listed_afresh(scratch) == [more != LONG] * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("length", "kept"), [(100, 6), (1500, 90)])
def test_keys_that_are_no_numbers_spoil_their_own_head_only(
    length: int, kept: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key of a head or all; what is chosen then are slots of the cache, and the search for it ends."""
    query, keys = separated(length, (3 * GROUP, 3), 64, torch.float32)
    spans = candidate_spans(torch.tensor([length, length]), torch.tensor([0, 0]), num_sinks=2).to(DEVICE)
    budget = torch.full((BATCH, 3), kept, dtype=torch.int32, device=DEVICE)
    found, expected = twins(new_state(query, keys, length + 10))
    given = {"spans": spans, "budget": budget, "rule": rule(3), "scale": 1.0}
    retrieve(query, keys, **given, state=expected, backend="reference")
    keys[:, 0, 50], keys[:, 1] = value, value
    configured(monkeypatch, listed=1)
    # the third time from what such a head left for a guess
    for scratch in (poisoned(keys), *[poisoned(keys, LONG)] * 2):
        found.count.zero_()
        found.anchor_slot.fill_(-1)
        retrieve(query, keys, **given, state=found, scratch=scratch, backend="triton")
        assert not scratch.tally.any()
    count = int(expected.count[0, 2])
    assert torch.equal(found.count[:, 2], expected.count[:, 2])
    assert torch.equal(found.indices[0, 2, :count], expected.indices[0, 2, :count])
    for row, written in enumerate(found.count[:, :2].flatten().tolist()):
        slots = found.indices[:, :2].flatten(0, 1)[row, :written]
        assert 0 < written <= length and ((slots >= 0) & (slots < length)).all()


def test_keeping_everything_appends_where_only_the_end_moved() -> None:
    """And lists anew after a jump of the end, a moved window, or a set of another step."""
    query, keys = separated(90, (2 * GROUP, 2), 64, torch.float32)
    state, scratch = new_state(query, keys, 80), poisoned(keys)
    everything = torch.full((BATCH, 2), 99, dtype=torch.int32, device=DEVICE)
    few = torch.full((BATCH, 2), 5, dtype=torch.int32, device=DEVICE)
    walk = [(60, 0, 4), (61, 0, 4), (62, 0, 4), (65, 0, 4), (66, 0, 10), (67, 0, 10), (68, 0, 4), (69, 2, 4)]
    for used, padding, window in walk:
        spans = candidate_spans(
            torch.full((BATCH,), used),
            torch.full((BATCH,), padding),
            num_sinks=3,
            window_start=torch.full((BATCH,), window),
        ).to(DEVICE)
        state = both(query, keys, spans, everything, rule(2), state, scratch)
        assert (state.decision == Decision.KEEP_ALL).all()
    state = both(query, keys, spans, few, rule(2), state, scratch)
    state.indices[0, 0, 20] = 7  # what is not the list of the step before must not be taken for it
    state.count.fill_(int(spans[0, 3] - spans[0, 2] + 3))
    spans[:, 3] += 1
    both(query, keys, spans, everything, rule(2), state, scratch)


@pytest.mark.parametrize("kind", [KeyCopyKind.INT8, KeyCopyKind.FP8, KeyCopyKind.INT4])
@pytest.mark.parametrize(("length", "dtype"), [(111, torch.float32), (300, DTYPES[-1])], ids=str)
def test_retrieval_on_a_low_bit_copy(kind: KeyCopyKind, length: int, dtype: torch.dtype) -> None:
    """Keys that are codes times a power of two: the scores are exact and the sets must be equal, ties too."""
    generator = torch.Generator().manual_seed(length)
    most = {KeyCopyKind.INT8: 127, KeyCopyKind.FP8: 15, KeyCopyKind.INT4: 7}[kind]
    keys = torch.randint(-most, most + 1, (BATCH, 2, length, 80), generator=generator) / 32
    keys[..., 1] = kind.largest / 32
    query = torch.zeros(BATCH, 2 * GROUP, 1, 80)
    query[:, ::2, :, 0], query[:, 1::2, :, 50] = 1.0, 0.5  # both halves of a byte of int4
    query, keys = query.to(DEVICE, dtype), keys.to(DEVICE, dtype)
    spans = candidate_spans(torch.tensor([length, length - 9]), torch.tensor([4, 0]), num_sinks=2).to(DEVICE)
    copy = KeyCopy.allocate(kind, BATCH, 2, length + 5, 80, DEVICE)
    copy.write(keys)
    copy.scale[:, :, :length].masked_fill_(~span_mask(spans, length)[:, None], torch.nan)
    copy.scale[:, :, length:] = torch.nan
    budget = torch.tensor([[20, 31], [length, 3]], dtype=torch.int32, device=DEVICE)
    audit = StepAudit.allocate(0.5, [11], BATCH, 2, GROUP, DEVICE)
    for _ in range(3):
        draw_coins(audit)
        both(
            query, keys, spans, budget, rule(2, gate=0), new_state(query, keys, length), poisoned(keys),
            key_copy=copy, audit=audit.layer(0),
        )  # fmt: skip
        audit.step.add_(1)


def test_audits_scan_exact_keys_and_change_nothing() -> None:
    query, keys = separated(200, (2 * GROUP, 2), 64, torch.float32)
    rules = rule(2, tau=-1.0, block=100)
    state, scratch = new_state(query, keys, 100), poisoned(keys)
    audit = StepAudit.allocate(0.5, [2**40 + 1], BATCH, 2, GROUP, DEVICE)
    coin, lse = audit.layer(0).coin, audit.layer(0).lse
    budget = torch.full((BATCH, 2), 20, dtype=torch.int32, device=DEVICE)
    coins = []
    for used in range(180, 190):
        spans = candidate_spans(torch.full((BATCH,), used), torch.zeros(BATCH), num_sinks=2).to(DEVICE)
        draw_coins(audit)
        lse.fill_(torch.nan)
        state = both(query, keys, spans, budget, rules, state, scratch, audit=audit.layer(0))
        coins.append(coin * (state.decision == Decision.SHARE))
        assert torch.equal(coins[-1] == 1, ~lse.isnan().any(-1)), (
            "scanned are those that share and were picked"
        )
        scores = torch.einsum("bhgd,bhnd->bhgn", query.view(BATCH, 2, GROUP, -1), keys[:, :, :used])
        exact = scores.logsumexp(-1)
        torch.testing.assert_close(lse[coins[-1] == 1], exact[coins[-1] == 1])
        audit.step.add_(1)
    assert not coins[0].any(), "a retrieval on exact keys needs no audit"
    thrown = torch.stack(coins[1:])
    assert 8 <= int(thrown.sum()) <= 28, "36 coins of 1/2"
    assert not torch.equal(thrown[0], thrown[1]) or not torch.equal(thrown[1], thrown[2])


def test_attention_to_kept_sets_does_not_wait_for_the_choice() -> None:
    """Heads that retrieve, share and keep everything: bit for bit what waiting for all of them gives."""
    length, steps, batch = (20_000, 300, 8) if DEVICE == "cuda" else (90, 4, 1)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPES[-1], device=DEVICE, generator=generator)

    query, keys, values = drawn(batch, 8, 1, 64), drawn(batch, 4, length, 64), drawn(batch, 4, length, 64)
    used, padding = torch.full((batch,), length - steps, device=DEVICE), torch.zeros(batch, device=DEVICE)
    spans = candidate_spans(used, padding.long(), num_sinks=2, num_local=3)
    budget = torch.full((batch, 4), length // 16, dtype=torch.int32, device=DEVICE)
    budget[:, 2] = length
    states, scratch = twins(new_state(query, keys, length)), poisoned(keys)
    given = {"spans": spans, "scale": 0.125}

    def attend(state: RetrievalState, decision: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        retrieve(
            query, keys, **given, budget=budget, rule=rule(4, tau=0.5, block=2**30, dilation=1), state=state,
            scratch=scratch, backend="triton",
        )  # fmt: skip
        return sparse_decode(
            query, keys, values, state.indices, count=state.count, decision=decision, mean_kept=length // 8,
            **given, backend="triton",
        )  # fmt: skip

    found: list[torch.Tensor] = []

    def both_ways() -> None:
        found[:] = [*attend(states[0], None), *attend(states[1], states[1].decision)]

    replay = capture([both_ways]).replay if DEVICE == "cuda" else both_ways
    seen: set[int] = set()
    for step in range(steps):
        fresh = torch.rand(batch, 4, 1, device=DEVICE, generator=generator) < (1 / 16 if step else 1)
        fresh = fresh.repeat_interleave(2, dim=1).unsqueeze(-1)
        query.copy_(torch.where(fresh, drawn(*query.shape), query))
        replay()
        seen.update(states[0].decision.flatten().tolist())
        assert all(torch.equal(one, other) for one, other in zip(found[:2], found[2:], strict=True)), step
        same(*states)
        spans[:, 3] += 1
    assert seen == set(Decision)


def test_scratch_that_is_too_small_is_refused() -> None:
    query, keys = separated(63, (2 * GROUP, 2), 64, torch.float32)
    scratch = RetrievalScratch.allocate(BATCH, 2, GROUP, 62, DEVICE)
    spans = torch.zeros(BATCH, 4, dtype=torch.int32, device=DEVICE)
    budget = torch.zeros(BATCH, 2, dtype=torch.int32, device=DEVICE)
    state = new_state(query, keys, 70)
    with pytest.raises(UsageError, match="rows of 62 slots, needed for 4 rows of 63"):
        retrieve(
            query, keys, spans=spans, budget=budget, rule=rule(2), state=state, scale=1.0, scratch=scratch,
            backend="triton",
        )  # fmt: skip

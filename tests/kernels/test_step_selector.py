"""Comparison methods in closed loop: the same sets step by step and in one pass, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.params import DepthParams, Gate
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.decode import generate_tokens
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.selectors.baselines import AtBudget, Baseline, OracleTopK, Quest, StreamingLLM
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model
from prhs_kernels.testing.runs import VARIANTS, feed

METHODS: dict[str, Baseline] = {
    "oracle": OracleTopK(),
    "streaming-llm": StreamingLLM(num_sinks=2),
    "quest": Quest(page_size=4),
}
TOKENS = random_tokens(60, seed=5)
PREFILL = 44


def score(
    model: Any, selector: AtBudget | None
) -> tuple[torch.Tensor, dict[str, float], list[LayerObservation]]:
    seen: list[LayerObservation] = []
    result = Scorer(model, TOKENS, PREFILL).run(dense_params(model.config), seen.append, selector)
    return result.logits, result.stats.to_dict(), seen


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_equals_step_by_step(variant: str, name: str) -> None:
    model_type, settings = VARIANTS[variant]
    model = exact_model(model_type, **settings)
    selector = AtBudget(METHODS[name], 0.3)
    logits, stats, _ = score(model, selector)
    with sparse_attention(model, dense_params(model.config), selector=selector) as cache:
        steps = feed(model, cache, [TOKENS[:PREFILL]], [TOKENS[PREFILL:]])[0]
    torch.testing.assert_close(logits, steps[1:], rtol=1e-9, atol=1e-9)
    assert stats == pytest.approx(cache.stats.to_dict(), rel=1e-12)
    dense, _, _ = score(model, None)
    assert (logits - dense).abs().max() > 1e-3, "a third of the positions must make a difference"


@pytest.mark.parametrize("window", [None, 20])
def test_only_the_chosen_positions_are_attended(window: int | None) -> None:
    """StreamingLLM's sets are known beforehand: sinks of the window and its end, renormalised."""
    model = exact_model("mistral", sliding_window=window)
    _, stats, seen = score(model, AtBudget(METHODS["streaming-llm"], 0.25))
    sizes = []
    for one in seen:
        for step, position in enumerate(one.positions.tolist()):
            first = 0 if window is None else position - window + 1
            size = round((position + 1 - first) * 0.25)
            sinks = max(2 - first, 0)
            wanted = {*range(sinks), *range(position + 1 - (size - sinks), position + 1)}
            for head in range(2):
                assert set(one.kept[head, step].nonzero().flatten().tolist()) == wanted
            sizes.append(size)
        assert not one.retrieved.any() and one.contested.all()
        kept = one.kept.repeat_interleave(2, 0)
        expected = one.dense_probs * kept / (one.dense_probs * kept).sum(-1, keepdim=True)
        torch.testing.assert_close(one.sparse_probs, expected, rtol=1e-9, atol=1e-12)
    assert stats["effective_budget"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-12)
    assert stats["retrieval_ratio"] == 0
    assert stats["kv_bytes_read"] == pytest.approx(stats["attended_fraction"], rel=0.02)


def test_the_oracle_ranks_by_this_runs_own_attention() -> None:
    """Closed loop: the sets are top-k of the queries and keys of the sparse run, not of the dense one."""
    model = exact_model("llama")
    _, stats, seen = score(model, AtBudget(METHODS["oracle"], 0.25))
    own = dense = 0
    for one, other in zip(seen, score(model, None)[2], strict=True):
        for step, position in enumerate(one.positions.tolist()):
            size = round((position + 1) * 0.25)
            for head in range(2):
                kept = set(one.kept[head, step].nonzero().flatten().tolist())
                own += kept == top(one.dense_probs, head, step, size)
                dense += kept == top(other.dense_probs, head, step, size)
    assert own == 4 * 16 * 2
    assert dense < own, "hidden states differ after the first sparse layer"
    # every visible key is scored, then K and V of a quarter are read
    assert stats["kv_bytes_read"] == pytest.approx(0.5 + 0.25, abs=0.01)
    assert stats["retrieval_ratio"] == 1


def top(probs: torch.Tensor, head: int, step: int, size: int) -> set[int]:
    mass = probs[2 * head, step] + probs[2 * head + 1, step]
    return set(mass.topk(size).indices.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_budget_is_dense_attention(name: str) -> None:
    model = exact_model("llama")
    logits, stats, _ = score(model, AtBudget(METHODS[name], 1.0))
    torch.testing.assert_close(logits, score(model, None)[0], rtol=1e-9, atol=1e-9)
    assert stats["attended_fraction"] == 1


def test_runs_on_one_prefill_do_not_disturb_each_other() -> None:
    model = exact_model("llama")
    dense = dense_params(model.config)
    cis = selector_params(model.config, time={"budget_tokens": 4, "tau_cos": 0.1, "gate": Gate.POST_ROPE})
    scorer = Scorer(model, TOKENS, PREFILL)
    selector = AtBudget(METHODS["quest"], 0.3)
    alone = [scorer.run(cis).logits, scorer.run(dense).logits, scorer.run(dense, None, selector).logits]
    with scorer.prepared(dense) as prepared:
        for _ in range(2):
            together = [
                prepared.run(cis).logits,
                prepared.run(dense).logits,
                prepared.run(dense, None, selector).logits,
            ]
            for one, other in zip(alone, together, strict=True):
                assert torch.equal(one, other)


def test_greedy_decoding_takes_the_same_choices() -> None:
    """What a teacher-forced pass says about the tokens that the loop itself wrote."""
    model = tiny_model("llama")
    selector = AtBudget(METHODS["oracle"], 0.2)
    stream = generate_tokens(
        model, [TOKENS], dense_params(model.config), max_new_tokens=12, selector=selector
    )
    written = [token[0] for token in stream]
    tokens = [*TOKENS, *(token for token in written if token is not None)]
    result = Scorer(model, tokens, len(TOKENS)).run(dense_params(model.config), None, selector)
    assert result.logits[:-1].argmax(-1).tolist() == written[1:]


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny_model("llama")
    selector = AtBudget(METHODS["oracle"], 0.5)
    windowed = selector_params(model.config, depth=DepthParams(1, 0.5))
    with pytest.raises(UsageError, match="takes the place of every axis"):
        Scorer(model, TOKENS, PREFILL).run(windowed, None, selector)
    with (
        pytest.raises(UsageError, match="takes the place of every axis"),
        sparse_attention(model, windowed, selector=selector),
    ):
        pass
    for prompts in ([TOKENS, TOKENS], [TOKENS, TOKENS[:40]]):
        with pytest.raises(UsageError, match="takes one unpadded sequence"):
            list(
                generate_tokens(
                    model, prompts, dense_params(model.config), max_new_tokens=2, selector=selector
                )
            )
    for fraction in (0.0, 1.1, float("nan")):
        with pytest.raises(UsageError, match="fraction of the visible"):
            AtBudget(METHODS["oracle"], fraction)

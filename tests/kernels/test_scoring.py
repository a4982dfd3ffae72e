"""Layer-parallel scoring: equal to step-by-step decode, and what an observer sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import DepthParams, FreezeMode, Gate, LayerParams
from prhs_kernels.runtime import scoring
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.attention import LayerObservation
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model
from prhs_kernels.testing.runs import VARIANTS, decode_steps

DEPTH, LAYER = DepthParams(1, 0.3), LayerParams(0, 0.4)
PROJECT = LayerParams(1, 0.5, 1.0, FreezeMode.PROJECT)
TOKENS = random_tokens(56, seed=3)


def time(**settings: Any) -> dict[str, Any]:
    return {"budget_tokens": [4, 7], "gate": [Gate.POST_ROPE, Gate.PRE_ROPE], "tau_cos": 0.1} | settings


CONFIGURATIONS = [
    (time(block=1), None, None, 40),
    (time(block=2), None, None, 40),
    (time(block=6), None, None, 40),
    (time(block=100), None, None, 40),
    (time(block=6, reanchor=False), None, None, 40),
    (time(block=100, reanchor=False, tau_cos=0.4), None, None, 40),
    (time(block=5, gate=Gate.NEVER), None, None, 40),
    (time(budget_ratio=[0.2, 1.0], dilation=0), None, None, 40),
    (time(budget_tokens=0), None, None, 40),
    (time(budget_tokens=1000), None, None, 40),
    (time(budget_tokens=12), None, None, 1),  # from the first token on; budgets become contested on the way
    (time(block=4), None, None, 55),  # a single decode step
    (None, DEPTH, None, 40),
    (None, None, LAYER, 40),
    (None, None, PROJECT, 40),
    (time(block=4), DEPTH, None, 40),
    (time(block=4, reanchor=False), None, LAYER, 40),
    (None, DEPTH, PROJECT, 40),
    (time(block=7), DEPTH, LAYER, 40),
    (time(block=7, reanchor=False), DEPTH, PROJECT, 23),
]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(("axis", "depth", "layer", "prefill"), CONFIGURATIONS)
def test_equals_step_by_step_decode(
    axis: dict[str, Any] | None,
    depth: DepthParams | None,
    layer: LayerParams | None,
    prefill: int,
    model_type: str,
) -> None:
    model = exact_model(model_type)
    params = selector_params(model.config, time=axis, depth=depth, layer=layer)
    steps: list[LayerObservation] = []
    logits, stats = decode_steps(model, TOKENS, prefill, params)
    decode_steps(model, TOKENS, prefill, params, steps.append)
    runs: list[LayerObservation] = []
    result = Scorer(model, TOKENS, prefill).run(params, runs.append)
    torch.testing.assert_close(result.logits, logits[1:], rtol=1e-10, atol=1e-10)
    assert result.stats.to_dict() == pytest.approx(stats.to_dict(), rel=1e-12, nan_ok=True)
    for index, step in enumerate(steps):
        at, run = index // params.num_layers, runs[step.layer]
        n = prefill + at + 1
        assert torch.equal(run.kept[:, at, :n], step.kept[:, 0])
        assert not run.kept[:, at, n:].any()
        assert torch.equal(run.retrieved[:, at], step.retrieved[:, 0])
        assert torch.equal(run.contested[:, at], step.contested[:, 0])
        for name in ("dense_probs", "sparse_probs"):
            if name == "dense_probs" and layer is not None:
                continue  # only a scoring pass knows the unfrozen keys
            torch.testing.assert_close(
                getattr(run, name)[:, at, :n], getattr(step, name)[:, 0], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_equals_step_by_step_decode_in_single_precision(model_type: str) -> None:
    """As it is used: the same sets, and logits as close to float64 as those of single steps."""
    settings = {"time": time(block=4), "depth": DEPTH, "layer": LAYER}
    exact, model = exact_model(model_type), tiny_model(model_type)
    params = selector_params(model.config, **settings)
    oracle = Scorer(exact, TOKENS, 40).run(params).logits
    steps: list[LayerObservation] = []
    logits, _ = decode_steps(model, TOKENS, 40, params)
    decode_steps(model, TOKENS, 40, params, steps.append)
    runs: list[LayerObservation] = []
    result = Scorer(model, TOKENS, 40).run(params, runs.append)
    rounding = (logits[1:] - oracle).norm()
    assert 0 < rounding < 1e-5 * oracle.norm()
    assert (result.logits - oracle).norm() <= 2 * rounding
    for index, step in enumerate(steps):
        at = index // params.num_layers
        assert torch.equal(runs[step.layer].kept[:, at, : 41 + at], step.kept[:, 0])


def observe(model: Any, params: Any, prefill: int = 40) -> list[LayerObservation]:
    seen: list[LayerObservation] = []
    Scorer(model, TOKENS, prefill).run(params, seen.append)
    return seen


@pytest.mark.parametrize("window", [None, 20])
def test_observation_is_what_it_says(window: int | None) -> None:
    """Shapes, and both distributions recomputed from the queries, keys, sets and scale beside them."""
    model = exact_model("mistral", sliding_window=window)
    params = selector_params(model.config, time=time(block=4), depth=DEPTH)
    for one in observe(model, params):
        assert one.query.shape == one.query_pre.shape == (1, 4, 16, 16)
        assert one.keys.shape == one.values.shape == (1, 2, 56, 16)
        assert one.positions.tolist() == list(range(40, 56))
        assert one.visible.shape == (16, 56) and one.kept.shape == (2, 16, 56)
        causal = torch.arange(56) <= one.positions[:, None]
        if window is not None:
            causal &= torch.arange(56) > one.positions[:, None] - window
        assert torch.equal(one.visible, causal)
        assert not (one.kept & ~one.visible).any()
        logits = one.query[0] @ one.keys[0].repeat_interleave(2, 0).mT * one.scale
        dense = logits.masked_fill(~one.visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(one.dense_probs, dense, rtol=1e-10, atol=1e-12)
        kept = one.kept.repeat_interleave(2, 0)
        sparse = (one.dense_probs * kept) / (one.dense_probs * kept).sum(-1, keepdim=True)
        torch.testing.assert_close(one.sparse_probs, sparse, rtol=1e-10, atol=1e-12)
        assert (one.retrieved & ~one.contested).sum() == 0


def test_queries_before_rope_are_the_projections() -> None:
    """Up to a positive factor, which the rounding of the rotary tables to float32 leaves near 1."""
    model: Any = exact_model("qwen3")
    projected: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_norm.register_forward_hook(lambda _, __, output: projected.append(output))
    seen = observe(model, selector_params(model.config, time=time()))
    for one, before in zip(seen, projected[4:], strict=True):  # the first four belong to the prefill
        torch.testing.assert_close(one.query_pre, before.transpose(1, 2), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(one.query, one.query_pre, atol=0.1)


def test_dense_runs_drop_nothing_and_retrieve_nothing() -> None:
    model = exact_model("llama")
    for one in observe(model, dense_params(model.config)):
        assert torch.equal(one.dense_probs, one.sparse_probs)
        assert torch.equal(one.kept, one.visible.expand_as(one.kept))
        assert not one.retrieved.any() and not one.contested.any()


@pytest.mark.parametrize("mode", FreezeMode)
def test_frozen_runs_are_compared_with_dense_attention_over_unfrozen_keys(mode: FreezeMode) -> None:
    model = exact_model("llama")
    params = selector_params(model.config, layer=LayerParams(0, 0.3, 1.0, mode))
    stock = {one.layer: one.keys for one in observe(model, dense_params(model.config))}
    for one in observe(model, params):
        end = params.frozen_prefix(one.layer, 40)
        keys = torch.cat([stock[one.layer][:, :, :end], one.keys[:, :, end:]], dim=2)
        logits = one.query[0] @ keys[0].repeat_interleave(2, 0).mT * one.scale
        dense = logits.masked_fill(~one.visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(one.dense_probs, dense, rtol=1e-10, atol=1e-12)
        moved = bool((one.dense_probs - one.sparse_probs).abs().sum() > 1e-3)
        # the first frozen layer projects hidden states that are still those of the dense model
        assert moved == (one.layer > (0 if mode is FreezeMode.SHARE else 1))


def test_prefill_loss_equals_the_loss_of_the_same_rows_as_decode_steps() -> None:
    """PSAW's mask is the same in prefill and decode, so a run without a prompt makes the same rows."""
    model = exact_model("llama")
    params = selector_params(model.config, depth=DEPTH)
    prompt, whole = TOKENS[:40], observe(model, params, prefill=1)
    measured = Scorer(model, [*prompt, 5], 40).run(params).prefill_dropped
    assert sorted(measured) == [2, 3], "layers 0 and 1 see everything"
    for layer, dropped in measured.items():
        one = whole[layer]
        rows = (one.dense_probs - one.sparse_probs).clamp(min=0).sum(-1)[:, :39]
        torch.testing.assert_close(dropped, rows.sum(-1) / 40, rtol=1e-8, atol=1e-12)  # row 0 drops nothing


def test_prefill_loss_is_absent_where_nothing_is_lost_and_there_where_tokens_are_frozen() -> None:
    model = exact_model("llama")
    scorer = Scorer(model, TOKENS, 40)
    assert scorer.run(selector_params(model.config, time=time())).prefill_dropped == {}
    dropped = scorer.run(selector_params(model.config, layer=LAYER)).prefill_dropped
    assert sorted(dropped) == [1, 2, 3]
    assert all(loss.shape == (4,) and (loss > 0).all() and (loss < 1).all() for loss in dropped.values())


def test_one_prefill_serves_many_runs() -> None:
    model = exact_model("llama")
    axes = [time(block=4), time(block=4, tau_cos=-1.0), time(budget_tokens=1), None]
    every = [selector_params(model.config, time=axis, depth=DEPTH, layer=LAYER) for axis in axes]
    scorer = Scorer(model, TOKENS, 40)
    alone = [scorer.run(params) for params in every]
    with scorer.prepared(every[0]) as prepared:
        for index in (0, 1, 2, 3, 1, 0):
            seen: list[LayerObservation] = []
            result = prepared.run(every[index], seen.append)
            assert torch.equal(result.logits, alone[index].logits)
            assert result.stats.to_dict() == pytest.approx(alone[index].stats.to_dict(), nan_ok=True)
            assert len(seen) == 4
    assert not torch.equal(alone[0].logits, alone[1].logits)


def test_a_run_that_needs_another_prefill_is_refused() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=time(), depth=DEPTH)
    with Scorer(model, TOKENS, 40).prepared(params) as prepared:
        for other in (
            selector_params(model.config, time=time()),
            selector_params(model.config, time=time(), depth=DEPTH, layer=LAYER),
            selector_params(model.config, time=time(), depth=DEPTH, num_sinks=3),
        ):
            with pytest.raises(UsageError, match="prepare again"):
                prepared.run(other)
        with pytest.raises(InputError, match="num_layers = 5"):
            prepared.run(dataclasses.replace(dense_params(model.config), num_layers=5))
        prepared.run(params)
    with pytest.raises(UsageError, match="only works inside"):
        prepared.run(params)


def test_an_observer_that_fails_leaves_the_scorer_usable() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=time())
    expected = Scorer(model, TOKENS, 40).run(params).logits

    def fail(_: LayerObservation) -> None:
        raise RuntimeError("on purpose")

    with Scorer(model, TOKENS, 40).prepared(params) as prepared:
        with pytest.raises(RuntimeError, match="on purpose"):
            prepared.run(params, fail)
        assert torch.equal(prepared.run(params).logits, expected)


@pytest.mark.parametrize("prefill", [0, -1, 56, 57])
def test_prompt_and_steps_need_a_token_each(prefill: int) -> None:
    with pytest.raises(UsageError, match=rf"prefill_length = {prefill} must be in \[1, 55\]"):
        Scorer(tiny_model("llama"), TOKENS, prefill)


def test_no_gradients_and_no_inference_mode_are_left_behind() -> None:
    model = tiny_model("llama")
    Scorer(model, TOKENS, 40).run(selector_params(model.config, time=time()))
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17])
@pytest.mark.parametrize(
    ("axis", "depth", "layer"), [(time(block=6), DEPTH, None), (time(block=5), None, LAYER)]
)
def test_long_runs_go_in_parts(
    axis: dict[str, Any],
    depth: DepthParams | None,
    layer: LayerParams | None,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anchors are carried over, as from one decode step to the next."""
    model = exact_model("llama")
    params = selector_params(model.config, time=axis, depth=depth, layer=layer)
    whole = Scorer(model, TOKENS, 40).run(params)
    monkeypatch.setattr(scoring, "MAX_STEPS", size)
    parts = Scorer(model, TOKENS, 40).run(params)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-10, atol=1e-10)
    assert parts.stats.to_dict() == pytest.approx(whole.stats.to_dict(), rel=1e-12)
    assert len(observe(model, params)) == 4, "an observer sees every layer once all the same"


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_scores_as_the_layer_parallel_pass(variant: str) -> None:
    """One prefill serves runs of several time axes, on the engine and off it, in any order."""
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    for depth, layer in ((None, None), (DEPTH, LAYER)):
        axes = (time(block=7), time(budget_tokens=12, dilation=0, block=1), None, time(block=4))
        settings = [selector_params(model.config, time=axis, depth=depth, layer=layer) for axis in axes]
        scorer = Scorer(model, TOKENS, 40)
        with scorer.prepared(settings[0]) as prepared:
            for params in settings:
                found = prepared.run_on_engine(params, "reference")
                expected = prepared.run(params)
                torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
                assert found.stats.to_dict() == pytest.approx(
                    expected.stats.to_dict(), rel=1e-12, nan_ok=True
                )
                assert found.prefill_dropped.keys() == expected.prefill_dropped.keys()

"""The decode loop: greedy and sampled, batches, stopping, streaming, and what it leaves behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prhs_kernels.errors import InputError, UsageError
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.runtime.decode import Generation, generate_tokens, left_pad
from prhs_kernels.runtime.sampling import Sampler, Sampling
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model
from prhs_kernels.testing.runs import VARIANTS

LENGTHS = [45, 9, 30]
PROMPTS = [random_tokens(length, seed=length) for length in LENGTHS]
TIME = {"budget_tokens": 4, "tau_cos": 0.1}
AXES: dict[str, dict[str, Any]] = {
    "off": {},
    "time": {"time": TIME},
    "depth": {"depth": DepthParams(0, 0.3)},
    "layer": {"layer": LayerParams(0, 0.4)},
    "all": {
        "time": TIME,
        "depth": DepthParams(0, 0.3),
        "layer": LayerParams(0, 0.4, 1.0, FreezeMode.PROJECT),
    },
}


def made(
    model: Any, prompts: list[list[int]], params: Any, count: int = 8, **settings: Any
) -> list[list[Any]]:
    """Tokens of every sequence."""
    rows = list(generate_tokens(model, prompts, params, max_new_tokens=count, **settings))
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_with_selectors_off_is_the_stock_model(variant: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model: Any = tiny_model(model_type, **overrides)
    for prompt in PROMPTS:
        expected = list(prompt)
        with torch.no_grad():
            for _ in range(8):  # without a cache: every step from scratch
                expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
        assert made(model, [prompt], dense_params(model.config)) == [expected[len(prompt) :]]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_of_three_gives_the_tokens_of_three_single_runs(variant: str, axes: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES[axes])
    together = made(model, PROMPTS, params)
    for row, prompt in enumerate(PROMPTS):
        assert made(model, [prompt], params) == [together[row]]


def test_sparse_tokens_differ_from_dense_ones() -> None:
    """Or the test above would hold for a loop that ignores its parameters."""
    model = exact_model("llama")
    tight = selector_params(model.config, time={"budget_tokens": 0}, num_sinks=0, num_local=1)
    assert made(model, PROMPTS, tight) != made(model, PROMPTS, dense_params(model.config))


def test_sampling_is_seeded() -> None:
    model = tiny_model("llama")
    params = selector_params(model.config, time=TIME)
    draws = [
        made(model, PROMPTS, params, sampling=Sampling(temperature=1.0, top_p=0.9, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert made(model, PROMPTS, params, sampling=Sampling(temperature=1.0, top_p=0.9, seed=0)) == draws[0]
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are his own"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_tempered_softmax(temperature: float) -> None:
    """20,000 seeded draws; five standard deviations of a binomial around every probability."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    count = 20_000
    drawn = Sampler(Sampling(temperature=temperature, seed=1))(logits.expand(count, -1))
    for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
        assert abs(int((drawn == token).sum()) - count * p) <= 5 * math.sqrt(count * p * (1 - p)) + 1


@pytest.mark.parametrize(
    ("top_p", "nucleus"), [(0.01, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.85, 3), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, nucleus: int) -> None:
    probs = torch.tensor([0.3, 0.2, 0.1, 0.4])  # best first: 3, 0, 1, 2
    drawn = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=2))(probs.log().expand(20_000, -1))
    kept = [3, 0, 1, 2][:nucleus]
    assert set(drawn.tolist()) == set(kept)
    for token in kept:  # what is kept keeps its proportions
        p = float(probs[token] / probs[kept].sum())
        assert abs(int((drawn == token).sum()) - 20_000 * p) <= 5 * math.sqrt(20_000 * p * (1 - p)) + 1


def test_greedy_ignores_the_seed_and_top_p() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(Sampling(top_p=0.5, seed=3))(logits), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 127, 4096])
def test_greedy_takes_the_first_of_equal_logits(vocabulary: int) -> None:
    logits = torch.randint(0, 3, (9, vocabulary), generator=torch.Generator().manual_seed(1)).bfloat16()
    first = [row.index(max(row)) for row in logits.tolist()]
    assert Sampler(Sampling())(logits).tolist() == first


def test_stop_tokens_end_each_sequence_for_itself() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=TIME)
    free = made(model, PROMPTS, params, count=12)
    # stop tokens that end the sequences at different times, the last one before the limit
    stops = [free[0][5], free[1][2], free[2][8]]
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in free]
    assert len(set(ends)) > 1, "the case must stop rows apart"
    run = Generation()
    rows = list(
        generate_tokens(model, PROMPTS, params, max_new_tokens=12, stop_token_ids=stops, run=run)
    )  # fmt: skip
    assert len(rows) == max(ends) + 1 == run.new_tokens, "the loop ends with the last sequence"
    for index, end in enumerate(ends):
        column = [row[index] for row in rows]
        assert column[: end + 1] == free[index][: end + 1], "the stop token itself is given"
        assert column[end + 1 :] == [None] * (len(rows) - end - 1)


@pytest.mark.parametrize("mode", ["audited", "released"])  # the reference loop, and the engine
def test_every_sequence_may_have_a_limit_of_its_own(mode: Any) -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=TIME)
    limits, free = [3, 8, 1], made(model, PROMPTS, params)
    run, alone = Generation(), DecodeStats()
    rows = list(generate_tokens(model, PROMPTS, params, max_new_tokens=limits, run=run, mode=mode))
    assert len(rows) == 8 == run.new_tokens
    for index, limit in enumerate(limits):
        column = [row[index] for row in rows]
        assert column == free[index][:limit] + [None] * (8 - limit)
        single = Generation()
        made(model, PROMPTS[index : index + 1], params, count=limit, run=single)
        alone = alone.merged(single.stats)
    assert run.stats.units == alone.units == (2 + 7) * 4 * 2
    assert run.stats.to_dict() == pytest.approx(alone.to_dict(), rel=1e-9)
    for wrong in ([3, 8], [3, 8, 0], 0):
        with pytest.raises(UsageError, match="at least 1, for all or for each prompt"):
            made(model, PROMPTS, params, count=wrong)  # type: ignore[arg-type]


def test_tokens_come_as_they_are_made() -> None:
    model: Any = tiny_model("llama")
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    stream = generate_tokens(model, [PROMPTS[0]], dense_params(model.config), max_new_tokens=4)
    assert not passes, "nothing runs before the first token is asked for"
    for count in range(1, 5):
        next(stream)
        assert len(passes) == count
    with pytest.raises(StopIteration):
        next(stream)
    assert len(passes) == 4


def test_the_caller_keeps_his_modes_between_tokens() -> None:
    model = tiny_model("llama")
    for _ in generate_tokens(model, [PROMPTS[0]], dense_params(model.config), max_new_tokens=3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight = torch.ones(1, requires_grad=True)
        (weight * 2).backward()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_an_abandoned_stream_puts_the_model_back() -> None:
    model: Any = tiny_model("llama")
    params = selector_params(model.config, **AXES["all"])
    stream = generate_tokens(model, [PROMPTS[0]], params, max_new_tokens=9)
    next(stream)
    assert model.config._attn_implementation == "prhs"
    with pytest.raises(UsageError, match="already inside"):
        next(generate_tokens(model, [PROMPTS[0]], params, max_new_tokens=9))
    stream.close()
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    made(model, [PROMPTS[0]], params)


def test_what_a_run_records() -> None:
    model = tiny_model("llama")
    params = selector_params(model.config, time=TIME)
    run = Generation()
    stream = generate_tokens(model, PROMPTS, params, max_new_tokens=5, run=run)
    assert math.isnan(run.time_to_first_token) and run.new_tokens == 0
    next(stream)
    assert run.prompt_tokens == sum(LENGTHS) and run.new_tokens == 1
    assert run.time_to_first_token > 0 and math.isnan(run.tokens_per_second)
    list(stream)
    assert run.new_tokens == 5 and run.tokens_per_second == 4 / run.decode_seconds > 0
    # the last token is never fed back: 4 decode steps, each in 3 rows, 4 layers and 2 KV heads
    assert run.stats.units == 4 * 3 * 4 * 2
    slots, row = max(LENGTHS) + 4, 2 * 2 * 16 * 4
    assert run.kv_bytes_resident == run.kv_bytes_resident_dense == 3 * 4 * slots * row
    report = run.to_dict()
    assert report["mode"] == "audited" and report["retrieval_ratio"] == run.stats.retrieval_ratio


def test_left_padding() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], pad_token_id=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_padding_token_may_occur_in_a_prompt() -> None:
    """Padding is known by the mask, not by the token."""
    model = exact_model("llama")
    params = selector_params(model.config, **AXES["all"])
    prompts = [[7, 0, 0, 9, 0] * 4, PROMPTS[0]]
    assert made(model, prompts, params)[0] == made(model, prompts[:1], params, pad_token_id=5)[0]


@pytest.mark.parametrize("prompts", [[], [[]], [[4, 5], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]]) -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(UsageError, match="at least one token"):
        made(model, prompts, dense_params(model.config))
    assert model.config._attn_implementation == "sdpa"


def test_settings_out_of_range_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="max_new_tokens = 0"):
        made(model, [PROMPTS[0]], dense_params(model.config), count=0)
    with pytest.raises(UsageError, match="2 streams to sample from for 1 prompts"):
        sampling = Sampling(temperature=1.0, streams=("a", "b"))
        made(model, [PROMPTS[0]], dense_params(model.config), sampling=sampling)
    for settings, match in (
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ):
        with pytest.raises(UsageError, match=match):
            Sampling(**settings)
    other = selector_params(tiny_model("llama", num_hidden_layers=2).config)
    with pytest.raises(InputError, match="num_layers = 2"):
        made(model, [PROMPTS[0]], other)


def test_one_token_prompts_and_one_new_token() -> None:
    model = exact_model("llama")
    for axes in AXES.values():
        params = selector_params(model.config, **axes)
        assert len(made(model, [[7]], params, count=3)[0]) == 3
        assert len(made(model, [[7], PROMPTS[1]], params, count=1)) == 2
    with sparse_attention(model, dense_params(model.config)) as cache:
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_the_end_of_a_prompt_can_be_decode_steps(steps: int) -> None:
    """Then the first new token is what a scoring pass predicts after the last of these steps."""
    model = exact_model("llama")
    params = selector_params(model.config, time=TIME | {"budget_tokens": 1}, num_sinks=1, num_local=2)
    singles = []
    for prompt in PROMPTS:
        run = Generation()
        written = made(model, [prompt], params, prompt_steps=steps, run=run)[0]
        result = Scorer(model, [*prompt, *written[:-1]], len(prompt) - steps).run(params)
        assert result.logits[steps - 1 :].argmax(-1).tolist() == written
        assert run.prompt_tokens == len(prompt) and run.new_tokens == 8
        assert run.stats.to_dict() == pytest.approx(result.stats.to_dict(), rel=1e-12)
        singles.append(written)
    assert made(model, PROMPTS, params, prompt_steps=steps) == singles
    dense = dense_params(model.config)
    assert made(model, PROMPTS, dense, prompt_steps=steps) == made(model, PROMPTS, dense)
    with pytest.raises(UsageError, match=f"prompt_steps = {steps + 1} must leave every prompt a token"):
        made(model, [PROMPTS[0], PROMPTS[0][: steps + 1]], params, prompt_steps=steps + 1)

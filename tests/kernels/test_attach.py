"""Selectors off is the stock model, everything is put back, and what is not supported is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from prhs_kernels.errors import InputError, PrhsError, UnsupportedModelError, UsageError
from prhs_kernels.ops.window_prefill import reference
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams, SelectorParams
from prhs_kernels.runtime import attach
from prhs_kernels.runtime.attach import check_supported, dense_params, sparse_attention
from prhs_kernels.runtime.decode import left_pad
from prhs_kernels.testing.allocations import allocations
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.models import tiny_config, tiny_model
from prhs_kernels.testing.runs import VARIANTS, decode_steps, feed

LENGTHS = [45, 9, 30]
PROMPTS = [random_tokens(length, seed=length) for length in LENGTHS]
STEPS = [random_tokens(6, seed=length + 1) for length in LENGTHS]
AXES: dict[str, dict[str, Any]] = {
    "off": {},
    "time": {"time": {"budget_tokens": 4, "tau_cos": 0.1}},
    "depth": {"depth": DepthParams(0, 0.3)},
    "layer": {"layer": LayerParams(0, 0.4)},
    "all": {
        "time": {"budget_tokens": 4, "tau_cos": 0.1},
        "depth": DepthParams(0, 0.3),
        "layer": LayerParams(0, 0.4, 1.0, FreezeMode.PROJECT),
    },
}


def stock(
    model: transformers.PreTrainedModel, prompts: list[list[int]], steps: list[list[int]]
) -> torch.Tensor:
    return feed(model, DynamicCache(config=model.config), prompts, steps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_selectors_off_is_stock_attention_bit_for_bit(variant: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides)
    for rows in ([0], [1], [0, 1, 2]):  # one sequence, a short one, a padded batch
        prompts, steps = [PROMPTS[row] for row in rows], [STEPS[row] for row in rows]
        expected = stock(model, prompts, steps)
        with sparse_attention(model, dense_params(model.config)) as cache:
            assert torch.equal(feed(model, cache, prompts, steps), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_prompt_position_is_stock_when_the_selectors_are_off(variant: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), sparse_attention(model, dense_params(model.config)) as cache:
        ours = model(input_ids=ids, past_key_values=cache).logits
    with torch.no_grad():
        assert torch.equal(ours, model(input_ids=ids).logits)


@pytest.mark.parametrize("time", [{"budget_ratio": 1.0}, {"budget_tokens": 1000}], ids=["dense", "covered"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_budget_is_stock_within_rounding(variant: str, time: dict[str, float]) -> None:
    """The error against float64 is at most twice that of stock attention in the same precision (norms)."""
    model_type, overrides = VARIANTS[variant]
    exact = stock(exact_model(model_type, **overrides), PROMPTS, STEPS)
    model = tiny_model(model_type, **overrides)
    rounding = (stock(model, PROMPTS, STEPS) - exact).norm()
    with sparse_attention(model, selector_params(model.config, time=time)) as cache:
        ours = feed(model, cache, PROMPTS, STEPS)
    assert 0 < rounding < 1e-5 * exact.norm()
    assert (ours - exact).norm() <= 2 * rounding
    assert cache.stats.attended_fraction == 1.0 and cache.stats.kv_bytes_read == 1.0


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_equals_its_rows_alone(variant: str, axes: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES[axes])
    with sparse_attention(model, params) as cache:
        together = feed(model, cache, PROMPTS, STEPS)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = decode_steps(model, prompt + STEPS[row], len(prompt), params)
        torch.testing.assert_close(together[row], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_an_mlp_in_parts_gives_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that end inside of a sequence, the last one short."""
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES["all"])
    found, seen = [], []
    act = model.model.layers[0].mlp.act_fn.forward
    monkeypatch.setattr(
        model.model.layers[0].mlp.act_fn, "forward", lambda x: (seen.append(x.shape[:2]), act(x))[1]
    )
    for tokens in (attach.MLP_TOKENS, 32):
        monkeypatch.setattr(attach, "MLP_TOKENS", tokens)
        with sparse_attention(model, params) as cache:
            found.append(feed(model, cache, PROMPTS, STEPS))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert seen[0] == (3, 45) and seen[7:12] == [(1, 32)] * 4 + [(1, 7)]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-window"])
def test_no_prefill_makes_a_table_of_tokens_by_slots(
    variant: str, axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded, in two parts: no block is as large as one sequence's boolean mask would be."""
    monkeypatch.setattr(reference, "QUERY_CHUNK", 64)
    model_type, overrides = VARIANTS[variant]
    model: Any = tiny_model(model_type, max_position_embeddings=2048, **overrides)
    length, first = 1500, 1400
    ids, mask = left_pad([random_tokens(length), random_tokens(length // 3)], pad_token_id=0)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)

    def prefill() -> None:
        with torch.no_grad(), sparse_attention(model, selector_params(model.config, **AXES[axes])) as cache:
            for part in (slice(0, first), slice(first, length)):
                model(
                    input_ids=ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                    logits_to_keep=1,
                )

    prefill()  # what is taken once and kept does not count
    found = allocations(prefill)
    assert 0 < found.largest < length * length


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3-window"])
def test_generate_of_transformers_works_inside_the_block(variant: str, axes: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model: Any = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES[axes])
    prompt = PROMPTS[0]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with sparse_attention(model, params) as cache:
        made = model.generate(torch.tensor([prompt]), past_key_values=cache, **settings)[0].tolist()
    assert made[: len(prompt)] == prompt and len(made) == len(prompt) + 8
    logits, _ = decode_steps(model, made, len(prompt), params)
    assert logits[:-1].argmax(-1).tolist() == made[len(prompt) :]
    if axes == "off":
        assert made == model.generate(torch.tensor([prompt]), **settings)[0].tolist()


def test_generate_of_transformers_takes_a_padded_batch() -> None:
    model: Any = exact_model("llama")
    params = selector_params(model.config, **AXES["all"])
    ids = torch.tensor([[0] * (45 - len(prompt)) + prompt for prompt in PROMPTS])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with sparse_attention(model, params) as cache:
        made = model.generate(ids, attention_mask=(ids > 0).long(), past_key_values=cache, **settings)
    for row, prompt in enumerate(PROMPTS):
        with sparse_attention(model, params) as cache:
            alone = model.generate(torch.tensor([prompt]), past_key_values=cache, **settings)
        assert made[row, -6:].tolist() == alone[0, -6:].tolist()


def patched_state(model: Any) -> tuple[Any, ...]:
    """Everything a block touches."""
    modules = [model, model.model, *model.model.modules()]
    return (
        model.config._attn_implementation,
        [sorted(vars(module)) for module in modules],
        [module.forward.__func__ for module in modules],
        [list(module._forward_pre_hooks.values()) for module in modules],
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("axes", AXES)
def test_everything_is_put_back(axes: str, implementation: str) -> None:
    model = tiny_model("llama", attn_implementation=implementation)
    params = selector_params(model.config, **AXES[axes])
    before, logits = patched_state(model), stock(model, PROMPTS[:1], STEPS[:1])
    with sparse_attention(model, params) as cache:
        feed(model, cache, PROMPTS[:1], STEPS[:1])
        assert model.config._attn_implementation == "prhs"
    assert patched_state(model) == before
    with pytest.raises(RuntimeError, match="on purpose"), sparse_attention(model, params) as cache:
        feed(model, cache, PROMPTS[:1], STEPS[:1])
        raise RuntimeError("on purpose")
    assert patched_state(model) == before
    assert torch.equal(stock(model, PROMPTS[:1], STEPS[:1]), logits)


def test_everything_is_put_back_when_the_forward_fails() -> None:
    model: Any = tiny_model("llama")
    before = patched_state(model)
    with (
        pytest.raises(IndexError),
        sparse_attention(model, selector_params(model.config, **AXES["all"])) as cache,
    ):
        model(input_ids=torch.tensor([[4, 10**6]]), past_key_values=cache)
    assert patched_state(model) == before


def test_a_forward_that_somebody_else_replaced_is_put_back() -> None:
    """As accelerate does when it spreads a model over devices."""
    model: Any = tiny_model("llama")
    layer, calls = model.model.layers[2], []
    own = layer.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = wrapped
    with sparse_attention(model, selector_params(model.config, **AXES["layer"])) as cache:
        feed(model, cache, PROMPTS[:1], [[]])
    assert layer.forward is wrapped and calls == [1]


def test_blocks_of_two_models_may_end_in_any_order() -> None:
    one, two = tiny_model("llama"), tiny_model("qwen2")
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    registered = dict(AttentionInterface._global_mapping)
    cache = first.enter_context(sparse_attention(one, dense_params(one.config)))
    other = second.enter_context(sparse_attention(two, selector_params(two.config, **AXES["time"])))
    feed(one, cache, PROMPTS[:1], STEPS[:1])
    first.close()
    feed(two, other, PROMPTS[:1], STEPS[:1])
    second.close()
    assert AttentionInterface._global_mapping == registered


def refusal(error: type[PrhsError], match: str) -> Any:
    """The error with its one line."""
    return pytest.raises(error, match=rf"\A(?=[^\n]*\Z).*{match}")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.Gemma2Config(), "gemma2"),
        (transformers.GptOssConfig(), "gpt_oss"),
        (transformers.PhiConfig(), "phi"),
        (transformers.MixtralConfig(), "mixtral"),
        (transformers.GPT2Config(), "gpt2"),
        (transformers.Llama4TextConfig(), "llama4_text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_architectures_are_refused_by_name(config: transformers.PreTrainedConfig, name: str) -> None:
    with refusal(UnsupportedModelError, f"'{name}' is not supported; supported are llama, mistral, qwen2"):
        check_supported(config)


def test_a_real_model_of_another_kind_is_refused_and_left_alone() -> None:
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    before = patched_state(model)
    params = SelectorParams(num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=8)
    with refusal(UnsupportedModelError, "mixtral"), sparse_attention(model, params):
        pass
    assert patched_state(model) == before


def test_settings_that_change_attention_are_refused_by_name() -> None:
    softcap = tiny_config("llama")
    softcap.attn_logit_softcapping = 50.0
    with refusal(UnsupportedModelError, "softcapping"):
        check_supported(softcap)
    rotary = tiny_config("llama")
    rotary.rope_parameters = {**rotary.rope_parameters, "partial_rotary_factor": 0.5}
    with refusal(UnsupportedModelError, "partial rotary"):
        check_supported(rotary)


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 5), ("num_qo_heads", 8), ("num_kv_heads", 4), ("head_dim", 32)]
)
def test_parameters_of_another_model_are_refused_by_field(field: str, value: int) -> None:
    model = tiny_model("llama")
    params = dataclasses.replace(dense_params(model.config), **{field: value})
    with refusal(InputError, rf"{field} = {value}.*has {getattr(dense_params(model.config), field)}"):
        with sparse_attention(model, params):
            pass


def test_nested_use_is_refused() -> None:
    model = tiny_model("llama")
    params = selector_params(model.config, **AXES["time"])
    with sparse_attention(model, params) as cache:
        with refusal(UsageError, "already inside"), sparse_attention(model, params):
            pass
        feed(model, cache, PROMPTS[:1], STEPS[:1])  # and the outer block still works


@pytest.mark.parametrize("axes", ["off", "all"])
def test_a_wrong_cache_is_refused(axes: str) -> None:
    model: Any = tiny_model("llama")
    params = selector_params(model.config, **AXES[axes])
    ids = torch.tensor([PROMPTS[0]])
    with sparse_attention(model, params) as stale:
        pass
    with sparse_attention(model, params):
        for wrong in (None, DynamicCache(), stale):
            with refusal(UsageError, "past_key_values"):
                model(input_ids=ids, past_key_values=wrong)


@pytest.mark.parametrize("axes", ["off", "all"])
def test_the_cache_is_refused_outside_its_block(axes: str) -> None:
    """The unpatched model would take it and silently attend to everything."""
    model = tiny_model("llama")
    with sparse_attention(model, selector_params(model.config, **AXES[axes])) as cache:
        feed(model, cache, PROMPTS[:1], STEPS[:1])
    with refusal(UsageError, "only works inside"):
        feed(model, cache, PROMPTS[:1], STEPS[:1])


def test_right_padding_and_odd_masks_are_refused() -> None:
    model: Any = tiny_model("llama")
    ids = torch.tensor([PROMPTS[0][:4]])
    with sparse_attention(model, selector_params(model.config, **AXES["time"])) as cache:
        for mask, match in (
            (torch.tensor([[1, 1, 1, 0]]), "padded on the left"),
            (torch.tensor([[1, 0, 1, 1]]), "padded on the left"),
            (torch.ones(1, 3, dtype=torch.long), r"\(1, 4\).*got \(1, 3\)"),
            (torch.ones(1, 1, 4, 4, dtype=torch.bool), r"\(1, 4\).*got \(1, 1, 4, 4\)"),
            ({"full_attention": None}, r"\(1, 4\).*got dict"),
        ):
            with refusal(UsageError, match):
                model(input_ids=ids, attention_mask=mask, past_key_values=cache)


def test_beam_search_is_refused() -> None:
    model: Any = tiny_model("llama")
    with sparse_attention(model, selector_params(model.config, **AXES["time"])) as cache:
        with refusal(UsageError, "beam search"):
            model.generate(
                torch.tensor([PROMPTS[0]]),
                past_key_values=cache,
                num_beams=2,
                max_new_tokens=3,
                pad_token_id=0,
            )


def test_embeddings_and_positional_tokens_are_accepted() -> None:
    model: Any = tiny_model("llama")
    params = selector_params(model.config, **AXES["all"])
    ids = torch.tensor([PROMPTS[0]])
    outputs = []
    with torch.no_grad():
        for call in (
            lambda cache: model(input_ids=ids, past_key_values=cache).logits,
            lambda cache: model(ids, past_key_values=cache).logits,
            lambda cache: model(inputs_embeds=model.model.embed_tokens(ids), past_key_values=cache).logits,
            lambda cache: model.lm_head(model.model(ids, past_key_values=cache).last_hidden_state),
        ):
            with sparse_attention(model, params) as cache:
                outputs.append(call(cache))
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


def test_taking_tokens_back_forgets_the_anchors() -> None:
    """As a rewound scoring pass or a rejected draft does: what follows equals a run without them."""
    model: Any = exact_model("llama")
    params = selector_params(model.config, **AXES["time"])
    prompt, steps = PROMPTS[0], STEPS[0]
    with sparse_attention(model, params) as cache:
        expected = feed(model, cache, [prompt], [steps])
    with sparse_attention(model, params) as cache:
        feed(model, cache, [prompt], [random_tokens(5, seed=99)])
        cache.crop(-5)
        assert cache.get_seq_length() == len(prompt)
        with torch.no_grad():
            rows = [
                model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
                for token in steps
            ]
    torch.testing.assert_close(torch.stack(rows, 1), expected[:, 1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window"])
def test_cache_sizes(variant: str) -> None:
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides)
    row = 2 * 2 * 16 * 4  # bytes of K and V of one position: 2 KV heads, head_dim 16, fp32
    with sparse_attention(model, selector_params(model.config, **AXES["time"])) as cache:
        assert cache.resident_bytes == cache.dense_bytes == 0
        feed(model, cache, PROMPTS[:1], STEPS[:1])
    slots = len(PROMPTS[0]) + len(STEPS[0])
    assert cache.resident_bytes == 4 * slots * row, "every position is kept"
    windowed = {"llama": 0, "mistral-window": 4, "qwen2-window": 2}[variant]
    assert cache.dense_bytes == ((4 - windowed) * slots + windowed * 19) * row

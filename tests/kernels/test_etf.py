"""ETF: frozen tokens are not computed, their keys come from where the mode says, decode never freezes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prhs_kernels.params import FreezeMode, LayerParams, SelectorParams
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.scoring import Scorer
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.runs import VARIANTS, decode_steps, feed

MODES = [FreezeMode.SHARE, FreezeMode.PROJECT]
PROMPT = 40


def freezing(model: Any, mode: FreezeMode, start_layer: int = 0, psi: float = 0.3) -> SelectorParams:
    return selector_params(model.config, layer=LayerParams(start_layer, psi, 1.0, mode))


class TokenCounter:
    """How many rows each layer's MLP and query projection computed, per forward pass."""

    def __init__(self, model: Any) -> None:
        self.rows: list[tuple[int, str, int]] = []
        for layer in model.model.layers:
            for name, module in (("mlp", layer.mlp), ("q", layer.self_attn.q_proj)):
                index = layer.self_attn.layer_idx
                module.register_forward_pre_hook(
                    lambda _, args, index=index, name=name: self.rows.append((index, name, args[0].shape[1]))
                )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_rows_are_skipped_and_decode_tokens_never_are(variant: str, mode: FreezeMode) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = freezing(model, mode, start_layer=1)
    counter = TokenCounter(model)
    tokens = random_tokens(PROMPT + 2)
    decode_steps(model, tokens, PROMPT, params)
    frozen = [params.frozen_prefix(layer, PROMPT) for layer in range(4)]
    assert frozen[:2] == [0, 0] and 0 < frozen[2] < frozen[3] < PROMPT
    expected = [(layer, name, PROMPT - frozen[layer]) for layer in range(4) for name in ("q", "mlp")]
    expected += 2 * [(layer, name, 1) for layer in range(4) for name in ("q", "mlp")]
    assert counter.rows == expected


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_share_takes_the_keys_of_the_last_layer_that_computed_them(variant: str) -> None:
    model = exact_model(variant)
    params = freezing(model, FreezeMode.SHARE)
    with sparse_attention(model, params) as cache:
        feed(model, cache, [random_tokens(PROMPT)], [[]])
        held = [cache.keys_and_values(layer) for layer in range(4)]
    ends = [params.frozen_prefix(layer, PROMPT) for layer in range(4)]
    assert ends == sorted(ends) and 0 == ends[0] < ends[1] < ends[3]
    for layer in range(1, 4):
        for mine, below in zip(held[layer], held[layer - 1], strict=True):
            assert torch.equal(mine[:, :, : ends[layer]], below[:, :, : ends[layer]])
            assert not torch.equal(mine[:, :, ends[layer]], below[:, :, ends[layer]])


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_project_uses_this_layers_weights_on_the_frozen_hidden_state(variant: str) -> None:
    """The stock attention module, given the frozen hidden states, makes the same keys and values."""
    model: Any = exact_model(variant)
    params = freezing(model, FreezeMode.PROJECT)
    inputs: dict[int, torch.Tensor] = {}
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args: inputs.__setitem__(module.self_attn.layer_idx, args[0])
        )
    tokens = random_tokens(PROMPT)
    with sparse_attention(model, params) as cache:
        feed(model, cache, [tokens], [[]])
        held = [cache.keys_and_values(layer) for layer in range(4)]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = model.model.layers[3]
    tables = model.model.rotary_emb(inputs[3], torch.arange(PROMPT)[None])
    with torch.no_grad():

        class Recorder:
            def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
                seen.append((key, value))
                return key, value

        layer.self_attn(
            layer.input_layernorm(inputs[3]),
            position_embeddings=tables,
            attention_mask=None,
            past_key_values=Recorder(),
        )
    for mine, stock in zip(held[3], seen[0], strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-12, atol=1e-12)


def test_frozen_hidden_states_pass_through() -> None:
    model: Any = exact_model("llama")
    params = freezing(model, FreezeMode.SHARE)
    states: list[torch.Tensor] = []
    for module in [*model.model.layers, model.model.norm]:
        module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with sparse_attention(model, params) as cache:
        feed(model, cache, [random_tokens(PROMPT)], [[]])
    states = [state for state in states if state.shape[1] == PROMPT]  # the wrapped layers' inputs and the end
    for layer, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        end = params.frozen_prefix(layer, PROMPT)
        assert torch.equal(before[:, :end], after[:, :end])
        assert (before[:, end:] != after[:, end:]).any(dim=-1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_batches_equal_single_runs(variant: str, mode: FreezeMode) -> None:
    """Rows of one batch freeze different numbers of tokens, one of them none at all."""
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = freezing(model, mode)
    prompts = [random_tokens(length, seed=length) for length in (50, 1, 33)]
    steps = [random_tokens(4, seed=length) for length in (50, 1, 33)]
    with sparse_attention(model, params) as cache:
        together = feed(model, cache, prompts, steps)
    for row, prompt in enumerate(prompts):
        alone, _ = decode_steps(model, prompt + steps[row], len(prompt), params)
        torch.testing.assert_close(together[row], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_a_later_chunk_of_tokens_is_not_frozen(mode: FreezeMode) -> None:
    """T is the length of the first prefill; what comes later builds on finished states."""
    model = exact_model("llama")
    counter = TokenCounter(model)
    tokens = torch.tensor([random_tokens(PROMPT)])
    with torch.no_grad(), sparse_attention(model, freezing(model, mode)) as cache:
        model(input_ids=tokens[:, :30], past_key_values=cache)
        counter.rows.clear()
        chunk = model(input_ids=tokens[:, 30:], past_key_values=cache).logits
    assert {rows for _, _, rows in counter.rows} == {10}
    with torch.no_grad(), sparse_attention(model, freezing(model, mode)) as cache:
        model(input_ids=tokens[:, :30], past_key_values=cache)
        steps = [
            model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(30, PROMPT)
        ]
    torch.testing.assert_close(chunk, torch.cat(steps, dim=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_shortest_prompts(length: int) -> None:
    """The last token is always computed, so that there is something to predict from."""
    model = exact_model("llama")
    params = freezing(model, FreezeMode.SHARE, psi=0.001)
    logits, _ = decode_steps(model, random_tokens(length + 2), length, params)
    assert logits.isfinite().all()
    assert all(params.frozen_prefix(layer, length) < length for layer in range(4))


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window"])
def test_audits_see_the_dense_models_keys_for_the_frozen_prefix(variant: str) -> None:
    """Also where a sliding window would have dropped their beginning."""
    model_type, overrides = VARIANTS[variant]
    model: Any = exact_model(model_type, **overrides)
    params = freezing(model, FreezeMode.SHARE)
    tokens = random_tokens(PROMPT + 3)
    stock: dict[int, torch.Tensor] = {}
    with sparse_attention(model, selector_params(model.config), lambda _: None) as cache:
        feed(model, cache, [tokens[:PROMPT]], [[]])
        stock = {layer: cache.keys_and_values(layer)[0] for layer in range(4)}
    with Scorer(model, tokens, PROMPT).prepared(params) as prepared:
        unfrozen = prepared._cache.unfrozen_keys
    assert sorted(unfrozen) == [1, 2, 3]
    for layer, keys in unfrozen.items():
        end = params.frozen_prefix(layer, PROMPT)
        torch.testing.assert_close(keys, stock[layer][:, :, :end], rtol=1e-12, atol=1e-12)

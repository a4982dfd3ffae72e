"""PSAW: the mask against the formula for every layer and position, release, and prefill of padded batches."""

from __future__ import annotations

import pytest
import torch

from prhs_kernels.ops.window_prefill import reference
from prhs_kernels.params import DepthParams, SelectorParams
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.testing import naive
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.runs import VARIANTS, decode_steps, feed

SCHEDULES = [DepthParams(0, 0.5), DepthParams(2, 0.05), DepthParams(1, 0.9, 3.0), DepthParams(3, 0.3, 0.0)]


def make_params(depth: DepthParams, num_sinks: int = 2, num_local: int = 3) -> SelectorParams:
    return SelectorParams(
        num_layers=6,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_sinks=num_sinks,
        num_local=num_local,
        depth=depth,
    )


def window_mask(
    params: SelectorParams, layer: int, length: int, padding: list[int], sliding_window: int | None = None
) -> torch.Tensor:
    rows = Rows(torch.arange(length), torch.tensor(padding), length, sliding_window)
    return candidates(rows, params, layer)


@pytest.mark.parametrize("depth", SCHEDULES)
@pytest.mark.parametrize(("num_sinks", "num_local"), [(0, 1), (2, 3), (4, 20)])
@pytest.mark.parametrize("sliding_window", [None, 9])
def test_mask_is_the_formula_at_every_layer_and_position(
    depth: DepthParams, num_sinks: int, num_local: int, sliding_window: int | None
) -> None:
    params, padding, length = make_params(depth, num_sinks, num_local), [0, 5, 63], 64
    for layer in range(params.num_layers):
        mask = window_mask(params, layer, length, padding, sliding_window)
        for row, pad in enumerate(padding):
            assert not mask[row, :pad].any() and not mask[row, :, :pad].any(), "padding sees and is nothing"
            for slot in range(pad, length):
                seen = {int(key) - pad for key in mask[row, slot].nonzero()}
                assert seen == naive.visible(params, layer, slot - pad, sliding_window), (layer, slot - pad)


@pytest.mark.parametrize("depth", SCHEDULES)
def test_what_a_window_dropped_never_comes_back(depth: DepthParams) -> None:
    """Later queries and deeper layers see no position that an earlier one had dropped: it can be freed."""
    params = make_params(depth)
    masks = torch.stack([window_mask(params, layer, 200, [0])[0] for layer in range(params.num_layers)])
    existing = torch.ones(200, 200, dtype=torch.bool).tril()
    dropped = existing & ~masks
    assert (dropped[:, 1:] | ~dropped[:, :-1]).all(), "over time"
    assert (dropped[1:] | ~dropped[:-1]).all(), "over layers"


def test_sinks_and_the_current_position_are_always_seen() -> None:
    masks = window_mask(make_params(DepthParams(0, 0.001, 5.0)), 5, 300, [0])[0]
    assert masks.diagonal().all()
    assert masks[:, :2].sum() == 2 * 300 - 1  # position 0 does not see sink 1 yet
    assert masks[-1].sum() == 2 + 3, "this steep, only sinks and local are left"


def test_layers_below_the_start_are_dense() -> None:
    params = make_params(DepthParams(3, 0.1))
    for layer in range(4):
        assert torch.equal(
            window_mask(params, layer, 50, [0])[0], torch.ones(50, 50, dtype=torch.bool).tril()
        )
    assert window_mask(params, 4, 50, [0]).sum() < 50 * 51 / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_prefill_and_decode_equal_single_runs(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERY_CHUNK", 16)
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, depth=DepthParams(0, 0.2))
    prompts = [random_tokens(length, seed=length) for length in (50, 1, 33)]
    steps = [random_tokens(4, seed=length) for length in (50, 1, 33)]
    with sparse_attention(model, params) as cache:
        together = feed(model, cache, prompts, steps)
    for row, prompt in enumerate(prompts):
        alone, _ = decode_steps(model, prompt + steps[row], len(prompt), params)
        torch.testing.assert_close(together[row], alone, rtol=1e-10, atol=1e-10)
    dense, _ = decode_steps(model, prompts[0] + steps[0], 50, dense_params(model.config))
    if "window" not in variant:  # the model's own window is narrower than PSAW's here
        assert (dense - together[0]).abs().max() > 1e-3, "the window must have dropped something"

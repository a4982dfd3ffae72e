"""The decode engine against the reference loop: same sets, same tokens, same statistics, less memory."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch

from prhs_kernels.errors import InputError, ResourceError, UnsupportedModelError, UsageError
from prhs_kernels.ops.backend import has_triton
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.retrieve.state import Decision
from prhs_kernels.ops.spans import span_mask
from prhs_kernels.params import DepthParams, FreezeMode, LayerParams, SelectorParams
from prhs_kernels.runtime import batch_step, index_sets
from prhs_kernels.runtime import engine as runtime
from prhs_kernels.runtime.attach import dense_params, sparse_attention
from prhs_kernels.runtime.decode import Generation, generate_tokens, left_pad
from prhs_kernels.runtime.decoder_step import LayerWeights, fuse
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.runtime.index_sets import set_capacity
from prhs_kernels.runtime.sampling import Sampling
from prhs_kernels.selectors import cis
from prhs_kernels.testing.inputs import exact_model, random_tokens, selector_params
from prhs_kernels.testing.models import tiny_model
from prhs_kernels.testing.runs import VARIANTS, feed

PROMPTS = [random_tokens(length, seed=length) for length in (45, 9, 30)]
STEPS = 12
MIXED = {"budget_tokens": 2, "budget_ratio": [0.1, 0.05], "tau_cos": 0.1, "gate": [1, 2], "block": 5}
AXES: dict[str, dict[str, Any]] = {
    "off": {},
    "time": {"time": {"budget_tokens": 4, "tau_cos": 0.1, "dilation": 2}},
    "depth": {"depth": DepthParams(0, 0.3)},
    "all": {
        "time": MIXED,
        "depth": DepthParams(1, 0.3),
        "layer": LayerParams(0, 0.4, 1.0, FreezeMode.PROJECT),
    },
}
HALF_DENSE = {"budget_ratio": [[1.0, 1.0], [0.1, 1.0], [1.0, 0.2], [0.1, 0.1]], "budget_tokens": 1}


def expected(model: Any, params: SelectorParams) -> tuple[list[list[int]], Generation]:
    run = Generation()
    rows = list(generate_tokens(model, PROMPTS, params, max_new_tokens=STEPS, run=run, backend="reference"))
    return [[token for token in row if token is not None] for row in rows], run


def opened(model: Any, params: SelectorParams, **settings: Any) -> DecodeEngine:
    return DecodeEngine(model, params, batch_size=3, max_len=len(PROMPTS[0]) + STEPS, **settings)


def decoded(engine: DecodeEngine) -> list[list[int]]:
    """Tokens per step."""
    tokens = [engine.start(engine.prefill(*left_pad(PROMPTS, 0))).tolist()]
    return tokens + [engine.step().tolist() for _ in range(STEPS - 1)]


@pytest.mark.parametrize("mode", ["audited", "released"])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_statistics_are_those_of_the_reference_loop(variant: str, axes: str, mode: Any) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AXES[axes])
    tokens, run = expected(model, params)
    with opened(model, params, mode=mode) as engine:
        assert decoded(engine) == tokens
        found = engine.stats()
    assert found.units == run.stats.units
    assert found.to_dict() == pytest.approx(run.stats.to_dict(), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("time", [AXES["time"]["time"], MIXED, HALF_DENSE])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3-window"])
def test_sets_are_those_of_the_reference_loop(
    variant: str, time: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step, layer, sequence and KV head; given tokens, so that one difference cannot cause the next."""
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, time=time, depth=DepthParams(1, 0.4))
    steps = torch.tensor([random_tokens(STEPS, seed=row) for row in range(3)])
    seen: list[torch.Tensor] = []
    select = cis.select

    def spy(*args: Any, **kwargs: Any) -> Any:
        selection, state = select(*args, **kwargs)
        seen.append(selection.kept[:, :, 0])
        return selection, state

    monkeypatch.setattr(cis, "select", spy)
    with sparse_attention(model, params) as cache:
        logits = feed(model, cache, PROMPTS, steps.tolist())
    retrievals = 0
    with opened(model, params) as engine:
        engine.prefill(*left_pad(PROMPTS, 0))
        for step, column in enumerate(steps.T):
            plan = engine._step.plan()
            engine.step(column)
            torch.testing.assert_close(engine.logits, logits[:, step + 1], rtol=0, atol=1e-12)
            for layer in range(params.num_layers):
                kept = seen[step * params.num_layers + layer]
                mask = span_mask(plan.spans[layer], kept.shape[-1])[:, None].expand_as(kept)
                state = engine.sets.states.get(layer)
                if state is not None:
                    retrievals += int((state.decision == int(Decision.RETRIEVE)).sum())
                    mask = mask & _as_mask(state.indices, state.count, kept.shape[-1])
                assert torch.equal(mask, kept), (step, layer)
    assert retrievals > 0


def _as_mask(indices: torch.Tensor, count: torch.Tensor, n: int) -> torch.Tensor:
    used = torch.arange(indices.shape[-1]) < count[..., None]
    hits = torch.nn.functional.one_hot(indices.clamp(min=0, max=n - 1).long(), n).bool() & used[..., None]
    return hits.any(dim=2)


def test_fp32_tokens_agree() -> None:
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        model = tiny_model(name, head_dim=64)
        params = selector_params(model.config, **AXES["time"])
        with opened(model, params) as engine:
            assert decoded(engine) == expected(model, params)[0]


def test_released_mode_holds_less_and_says_how_much() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, depth=DepthParams(0, 0.05))
    resident = {}
    for mode in ("audited", "released"):
        run = Generation()
        list(generate_tokens(model, PROMPTS[:1], params, max_new_tokens=4, run=run, mode=mode))
        resident[mode] = run.kv_bytes_resident
        assert run.mode == mode
    # 46 positions of the first decode step, of which layer l no longer needs floor((1 - 0.05^(l/4)) 45) but
    # its 2 sinks; room for 4 tokens more
    slots = [49 - max(0, int((1 - 0.05 ** (layer / 4)) * 45) - 2) for layer in range(4)]
    assert resident["released"] == sum(slots) * 2 * 2 * 16 * 8 < 0.75 * resident["audited"]
    assert run.notes == []


def test_released_mode_says_when_there_is_nothing_to_release() -> None:
    model = exact_model("llama")
    for mode, said in (("audited", 0), ("released", 1)):
        run, params = Generation(), selector_params(model.config, time=MIXED)
        list(generate_tokens(model, PROMPTS[:2], params, max_new_tokens=2, run=run, mode=mode))
        assert sum(note.startswith("nothing to release: ") for note in run.notes) == said


def test_prompt_steps_and_stop_tokens_go_through_the_engine_too() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=MIXED, depth=DepthParams(0, 0.5))
    free = expected(model, params)[0]
    for settings in ({"prompt_steps": 5}, {"stop_token_ids": [free[5][0], free[3][1]]}):
        runs = [Generation(), Generation()]
        rows = [
            list(generate_tokens(model, PROMPTS, params, max_new_tokens=8, run=run, mode=mode, **settings))
            for run, mode in zip(runs, ("audited", "released"), strict=True)
        ]
        assert rows[0] == rows[1]
        assert runs[0].new_tokens == runs[1].new_tokens
        assert runs[0].stats.units == runs[1].stats.units
        assert runs[1].stats.to_dict() == pytest.approx(runs[0].stats.to_dict(), rel=1e-12)


def test_sampling_draws_the_same_tokens_in_both_loops() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=MIXED)
    settings = {"max_new_tokens": 8, "sampling": Sampling(temperature=1.3, top_p=0.9, seed=4)}
    rows = [
        list(generate_tokens(model, PROMPTS, params, mode=m, **settings)) for m in ("audited", "released")
    ]
    assert rows[0] == rows[1]


def test_a_second_prompt_through_the_same_engine() -> None:
    model = exact_model("llama")
    params = selector_params(model.config, time=MIXED)
    with opened(model, params) as engine:
        first = decoded(engine)
        stats = engine.stats()
        assert decoded(engine) == first and engine.stats() == stats


def test_dense_attention_ignores_the_selectors() -> None:
    model = exact_model("mistral", sliding_window=20)
    params = selector_params(model.config, **AXES["all"])
    with opened(model, params, attention="dense") as engine:
        assert decoded(engine) == expected(model, dense_params(model.config))[0]
        assert engine.stats().attended_fraction == engine.stats().kv_bytes_read == 1.0


def test_random_caches_for_benchmarks() -> None:
    model = tiny_model("llama")
    params = selector_params(
        model.config, time={"budget_tokens": 4, "gate": [0, 1], "tau_cos": -1.0, "block": 99}
    )
    with DecodeEngine(model, params, batch_size=2, max_len=64) as engine:
        engine.fill_random(50, seed=0)
        first = engine.cache.keys[3][:, :, :50].clone()
        assert bool(first.isfinite().all()) and 0.9 < float(first.std()) < 1.1
        for _ in range(5):
            engine.step()
        # the first head always retrieves, the second only at the first step
        stats = engine.stats()
        assert stats.units == 5 * 2 * 4 * 2 and stats.retrieval_ratio == pytest.approx(6 / 10)
        engine.fill_random(50, seed=0)
        assert torch.equal(engine.cache.keys[3][:, :, :50], first)
        with pytest.raises(UsageError, match="kv_len = 64"):
            engine.fill_random(64, seed=0)


def test_fused_weights_are_the_same_parameters() -> None:
    model: Any = tiny_model("qwen2")
    attention = model.model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    before, same = copy.deepcopy(model.state_dict()), [module.weight for module in modules]
    with torch.inference_mode():
        weight, bias = fuse(modules)
    assert all(module.weight is old for module, old in zip(modules, same, strict=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again, _ = fuse(modules)
    assert again.data_ptr() == weight.data_ptr(), "fused once"
    row = torch.randn(3, weight.shape[1])
    parts = torch.cat([module(row) for module in modules], dim=-1)
    torch.testing.assert_close(torch.nn.functional.linear(row, weight, bias), parts)
    parts.sum().backward()
    assert all(module.weight.grad is not None for module in modules), "still fit for training"
    with torch.no_grad():
        attention.k_proj.weight.zero_()
    assert bool((weight[64:96] == 0).all()), "what is written to a parameter is what the step reads"


def test_a_fused_model_can_be_saved(tmp_path: Any) -> None:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        LayerWeights.of(layer)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_model_is_put_back_after_an_exception() -> None:
    model: Any = tiny_model("llama")
    params = selector_params(model.config, **AXES["all"])
    with pytest.raises(RuntimeError, match="in between"), opened(model, params) as engine:
        decoded(engine)
        raise RuntimeError("in between")
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(UsageError, match="inside its with block"):
        engine.step()
    stream = generate_tokens(model, PROMPTS, params, max_new_tokens=5, mode="released")
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert expected(model, params)[0]


@pytest.mark.parametrize("where", ["prefill", "step", "capture", "enter"])
def test_memory_that_runs_out_inside(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with both sizes, nothing of the attempt is kept, and the engine goes on."""
    model: Any = tiny_model("llama")
    params = selector_params(model.config, **AXES["all"])
    tokens = expected(model, params)[0]
    left: list[weakref.ref[torch.Tensor]] = []

    def failing(*_: Any, **__: Any) -> Any:
        activations = torch.empty(1000)
        left.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken(*_: Any, **__: Any) -> Any:
        try:
            failing()
        finally:  # what ends a capture fails as well, and hides why
            raise RuntimeError("operation failed due to a previous error during capture")

    engine = opened(model, params)
    with monkeypatch.context() as patch, pytest.raises(ResourceError) as caught:
        if where == "enter":
            patch.setattr(batch_step, "IndexSets", failing)
        with engine:
            if where == "prefill":
                patch.setattr(model.model.layers[2].mlp, "forward", failing)
            engine.prefill(*left_pad(PROMPTS, 0))
            patch.setattr(index_sets.IndexSets, "attend", failing)
            patch.setattr(runtime, "capture", broken)
            engine.capture() if where == "capture" else engine.step()
    assert "out of memory on cpu with batch 3 x 57 positions: about 0." in str(caught.value)
    assert "what may fit: 28 positions at batch 3 or batch 1 at 57 positions" in str(caught.value)
    assert [reference() for reference in left] == [None], "held by a frame of the exception"
    assert getattr(engine, "cache", None) is None and model.config._attn_implementation == "sdpa"
    with engine:
        assert decoded(engine) == tokens


def test_what_the_engine_refuses() -> None:
    model: Any = tiny_model("llama")
    params = selector_params(model.config, time={"reanchor": False})
    with pytest.raises(UnsupportedModelError, match="reanchor = False"):
        opened(model, params)
    with pytest.raises(UnsupportedModelError, match="mode 'released' needs .* reanchor .*; use 'audited'"):
        generate_tokens(model, PROMPTS, params, max_new_tokens=2, mode="released")
    plain = dense_params(model.config)
    with pytest.raises(UnsupportedModelError, match="activation 'gelu'"):
        opened(tiny_model("llama", hidden_act="gelu"), plain)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="rotary embedding of type 'dynamic'"):
        opened(tiny_model("llama", rope_parameters=rope), plain)
    with pytest.raises(InputError, match="num_layers = 4"):
        opened(tiny_model("llama", num_hidden_layers=2), plain)
    with pytest.raises(UsageError, match="CUDA device"):
        opened(model, plain, use_graph=True)
    with pytest.raises(UsageError, match="an audit needs mode 'audited'"):
        opened(model, plain, mode="released", audit=0.1)
    with opened(model, plain) as engine:
        with pytest.raises(UsageError, match="call prefill"):
            engine.step()
        with pytest.raises(UsageError, match=r"prompts \[2, 9\] do not fit batch_size = 3"):
            engine.prefill(torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long))
        decoded(engine)
        engine.step()
        with pytest.raises(UsageError, match="57 slots is full"):
            engine.step()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="forward hook on LlamaMLP"):
        opened(model, plain)
    handle.remove()
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False))
    with pytest.raises(UnsupportedModelError, match="layer 1 up_proj is not a plain linear"):
        opened(model, plain)


@pytest.mark.parametrize("key_copy", ["int8", "int4"])
@pytest.mark.parametrize("mode", ["audited", "released"])
def test_key_copies_choose_what_the_reference_loop_chooses(key_copy: str, mode: Any) -> None:
    """Copies of a prefix, of every later token, and in released mode of what is left of the cache."""
    model = exact_model("qwen3").float()
    time = {"budget_tokens": 3, "tau_cos": 0.1, "block": 4}
    params = selector_params(
        model.config, time=time, depth=DepthParams(1, 0.3), key_copy=KeyCopyKind(key_copy)
    )
    tokens, run = expected(model, params)
    with opened(model, params, mode=mode) as engine:
        assert decoded(engine) == tokens
        found = engine.stats()
        plain = engine.cache.resident_bytes
        assert engine.resident_bytes > plain and len(engine.sets.copies) == 4
    assert found.to_dict() == pytest.approx(run.stats.to_dict(), rel=1e-12)


AUDITED: dict[str, dict[str, Any]] = {
    "time": {"time": HALF_DENSE},
    "depth": {"depth": DepthParams(0, 0.3)},
    "both": {"time": HALF_DENSE, "depth": DepthParams(1, 0.3)},
    "copies": {"time": MIXED, "depth": DepthParams(2, 0.2), "key_copy": KeyCopyKind.INT8},
}


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@pytest.mark.parametrize("axes", AUDITED)
def test_an_audit_of_everything_finds_what_the_reference_loop_finds(
    axes: str, variant: str, stops: bool
) -> None:
    model_type, overrides = VARIANTS[variant]
    model = exact_model(model_type, **overrides)
    params = selector_params(model.config, **AUDITED[axes])
    model = model.float() if axes == "copies" else model
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "audit": 1.0}
    if stops:
        free = expected(model, params)[0]
        settings["stop_token_ids"] = [free[2][0], free[4][2]]
    run = Generation()
    list(generate_tokens(model, PROMPTS, params, run=run, backend="reference", **settings))
    assert run.audit is not None and run.audit.estimate > (0.01 if variant == "llama" else 1e-6)
    with opened(model, params, audit=1.0, stop_token_ids=tuple(settings.get("stop_token_ids", ()))) as engine:
        decoded(engine)
        found = engine.audit()
    assert found is not None and found.units == run.audit.units == run.stats.units
    assert found.estimate == pytest.approx(run.audit.estimate, rel=1e-4)
    assert found.interval() == (found.estimate, found.estimate)


@pytest.mark.parametrize("axes", [{"time": MIXED}, AUDITED["depth"], AUDITED["both"]])
def test_an_audit_by_a_coin_covers_the_truth_and_changes_nothing(axes: dict[str, Any]) -> None:
    model = exact_model("llama")
    params = selector_params(model.config, **axes)
    with opened(model, params, audit=1.0) as engine:
        tokens, truth = decoded(engine), engine.audit().estimate
    audits = []
    for seed in range(4):
        with opened(model, params, audit=0.3, audit_seed=seed) as engine:
            assert decoded(engine) == tokens
            audits.append(engine.audit())
    assert len({audit.audited_units for audit in audits}) > 1, "another seed, other coins"
    for audit in audits:
        lower, upper = audit.interval(0.999)
        assert lower <= truth <= upper
        assert 0.1 < audit.audited_units / audit.other_units < 0.5


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_a_backend_that_cannot_run_here_is_refused() -> None:
    model = tiny_model("llama", head_dim=64)
    with pytest.raises(ResourceError, match="needs a CUDA device"):
        next(generate_tokens(model, PROMPTS, dense_params(model.config), max_new_tokens=2, backend="triton"))


def test_no_set_outgrows_its_capacity() -> None:
    """Budget, neighbours, sinks, local positions and what is added while a set is shared."""
    model = exact_model("llama")
    time = {"budget_tokens": 3, "tau_cos": -1.0, "block": 1000, "dilation": 3}
    params = selector_params(model.config, time=time)
    assert set_capacity(params, [None] * 4, 512) == 512  # shared sets grow until the cache is full
    time["block"] = 4
    params = selector_params(model.config, time=time)
    assert set_capacity(params, [None] * 4, 512) == 32  # 3 + 2 * 3 * 1 + 2 + 4 + 4, in sixteens
    with opened(model, params) as engine:
        assert decoded(engine) == expected(model, params)[0]

"""Benchmarks: figures from synthetic timings, what is refused, whole runs at toy size in the interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prhs_kernels.bench import operator, peers, report, rivals, session
from prhs_kernels.bench.cases import Case, Inputs, Problem, run
from prhs_kernels.bench.dense_cases import AS_GPT_FAST
from prhs_kernels.bench.operator import Plan, cost, default_points
from prhs_kernels.bench.retrieval_cases import spread
from prhs_kernels.bench.session import Session, choose_device, choose_dtype
from prhs_kernels.bench.shapes import SHAPES, TOY, ModelShape, Point, grid
from prhs_kernels.bench.timing import Timing, copies_for
from prhs_kernels.errors import ResourceError, UsageError
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.testing.models import tiny_model

PROBLEM = Problem("p", 8, 32768, 32, 8, 1024)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def child(*arguments: str, interpret: str = "1") -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: triton decides at import whether it interprets."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": interpret,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )


def row(case: str, kind: str, spent: float | None, num_bytes: int = 0) -> dict[str, Any]:
    """A measured row, or one that failed; the copy rate is 4000 bytes per microsecond."""
    timing = None if spent is None else {"p20": spent - 1, "p50": spent, "p80": spent + 1}
    status, error = ("failed", "no luck") if spent is None else ("ok", "")
    return {
        "key": case, "problem": vars(PROBLEM), "case": case, "kind": kind, "num_bytes": num_bytes,
        "timing": timing, "status": status, "error": error, "note": "", "values": {}, "copy_rate": 4000.0,
    }  # fmt: skip


def rows(dense: float = 80.0) -> list[dict[str, Any]]:
    return [
        row("dense_decode", "dense", 100.0, 320_000),
        row("sdpa cudnn", "dense", dense, 320_000),
        row(AS_GPT_FAST, "masked", 20.0, 320_000),  # faster, but not a rival
        row("sparse_decode", "sparse", 5.0, 16_000),
        row("scan", "stage", 50.0, 160_000),
        row("broken", "sparse", None, 16_000),
    ]


def test_figures_of_a_row() -> None:
    """Dense is the fastest unmasked one; the floor is bytes over the measured copy rate."""
    ours, cudnn, masked, sparse, scan, broken = report.derive(rows(), "a card")
    assert ours["over_dense"] == 0.8 and cudnn["over_dense"] == 1 and masked["over_dense"] == 4
    assert sparse["floor_us"] == 4 and sparse["floor_fraction"] == pytest.approx(0.8)
    assert sparse["tb_per_s"] == pytest.approx(16_000 / 5 / 1e6)
    assert (sparse["over_dense"], sparse["over_masked"], sparse["claimed"]) == (16, 4, True)
    assert scan["over_dense"] is None and scan["floor_fraction"] == pytest.approx(0.8)
    assert broken["over_dense"] is None and broken["floor_us"] is None and not broken["claimed"]


def test_no_claim_over_a_slow_dense() -> None:
    """80 us would be the copy bandwidth; 100 us is 80 % of it, 101 less."""
    assert report.derive(rows(100.0), "a card")[3]["claimed"]
    slow = [{**each} for each in rows(101.0)]
    slow[0]["timing"] = None
    assert not report.derive(slow, "a card")[3]["claimed"]
    (drawn,) = report.tables(slow, "a card")
    assert ["sparse_decode", "(20.20)"] == [drawn.rows[2][0], drawn.rows[2][6]]
    assert any("no claim" in note for note in drawn.notes)


def test_published_time_counts_as_full_speed() -> None:
    """On an H200 FlashAttention-3 needs 253.5 us here: 300 us are 84 % of its rate."""
    slow = [row("sdpa cudnn", "dense", 300.0, 320_000), row("sparse_decode", "sparse", 5.0, 16_000)]
    assert not report.derive(slow, "NVIDIA A100")[1]["claimed"]
    derived = report.derive(slow, "NVIDIA H200")
    assert derived[1]["claimed"] and derived[1]["published_us"] == 253.5
    assert "published 253.5 us" in report.tables(slow, "NVIDIA H200")[0].notes[-1]


def test_published_time_of_a_layer_is_not_that_of_a_step() -> None:
    step = [{**row("dense", "dense", 300.0, 320_000), "values": {"tokens_per_s": 1.0}}]
    assert report.derive(step, "NVIDIA H200")[0]["published_us"] is None


def test_tables_name_failures_and_peers() -> None:
    (drawn,) = report.tables([*rows(), row("Quest", "peer", 30.0, 1)], "a card")
    assert "broken: failed, no luck" in drawn.notes
    assert drawn.rows[-1][0] == "Quest (our implementation)"
    assert len(drawn.rows) == 6 and all(len(cells) == len(drawn.columns) for cells in drawn.rows)


def test_without_dense_no_ratio() -> None:
    (drawn,) = report.tables([row("sparse_decode", "sparse", 5.0, 16_000)], "a card")
    assert drawn.rows[0][6] is None and "no speed-up" in drawn.notes[-1]


def test_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == Timing(1.0, 2.0, 4.0)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0)


def timed(prepare: Any) -> Any:
    return run(Case("case", "sparse", 5, prepare), PROBLEM, "cpu")


def test_what_is_wrong_is_not_timed() -> None:
    ran: list[int] = []

    def wrong() -> list[Any]:
        raise AssertionError("output: error 3, allowed 1\nassert 3 <= 1")

    found = timed(wrong)
    assert found.status == "wrong" and found.timing is None and not ran
    assert found.error == "wrong result, not timed: output: error 3, allowed 1"
    assert timed(lambda: [lambda: ran.append(1)]).status == "ok" and ran == [1]


def test_what_fails_is_a_row() -> None:
    def broken() -> list[Any]:
        raise RuntimeError("No available kernel\nsecond line")

    def full() -> list[Any]:
        raise torch.cuda.OutOfMemoryError("tried to allocate 3 GiB")

    assert timed(broken).error == "RuntimeError: No available kernel"
    found = run(Case("case", "sparse", 5, full), PROBLEM, "cpu", "needs about 9.0 GiB")
    assert found.status == "out of memory" and found.timing is None
    assert found.error == "needs about 9.0 GiB: OutOfMemoryError: tried to allocate 3 GiB"


def test_too_large_for_the_device_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is allocated to find out."""
    monkeypatch.setattr(operator, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(Inputs, "_random", lambda *arguments: pytest.fail("allocated"))
    monkeypatch.setattr(operator.timing, "copy_time", lambda device: Timing(1.0, 1.0, 1.0))
    done = Session([], lambda rows: None)
    plan = Plan(grid(["llama-3-8b"], [64], [2**20], [1024]), (0.0,))
    assert operator.measure(plan, done, "cuda", torch.bfloat16) and len(done.rows) > 10
    for found in done.rows:
        assert found["status"] == "out of memory" and found["timing"] is None
        assert "GiB, 1.0 GiB are free" in found["error"] and found["error"].startswith("needs about ")


def test_session_writes_after_every_row_and_stops_when_the_device_is_lost() -> None:
    written: list[int] = []
    done = Session([row("a", "dense", 1.0)], lambda rows: written.append(len(rows)))
    assert done.has("a") and not done.has("b") and not done.out_of_time()
    done.keep(row("b", "dense", 1.0))
    assert written == [2]
    with pytest.raises(ResourceError, match="goes on with the cases after it"):
        done.keep({**row("c", "dense", None), "error": "AcceleratorError: CUDA error: an illegal access"})
    assert written == [2, 3]
    assert Session([], written.append, seconds=0.0).out_of_time()


def test_sizes_of_the_shapes() -> None:
    """Parameters in billions, as the models' cards state them."""
    stated = {
        "llama-2-7b": 6.74, "llama-3-8b": 8.03, "mistral-7b": 7.25, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19,
    }  # fmt: skip
    for name, billions in stated.items():
        assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.005), name
    rank = SHAPES["llama-3-70b-tp8"]
    assert 8 * rank.num_parameters / 1e9 == pytest.approx(70.6, rel=0.005)
    assert SHAPES["llama-3-8b"].kv_bytes(16, 4096, 2) == 16 * 4096 * 2**17  # 128 KiB per token


def test_grid() -> None:
    points = grid(["llama-3-8b"], [1, 2], [4096, 8192], [1 / 8, 600])
    assert [(p.batch, p.context, p.kept) for p in points[:3]] == [
        (1, 4096, 512), (1, 4096, 600), (1, 8192, 1024),
    ]  # fmt: skip
    for sizes, words in (
        ((["gpt-5"], [1], [64], [0.5]), "choose from llama-2-7b"),
        ((["llama-2-7b"], [0], [64], [50]), "at least 1"),
        ((["llama-2-7b"], [1], [64], [64]), "less than the context"),
        ((["llama-2-7b"], [1], [64], [0.25]), "at least 40"),
    ):
        with pytest.raises(UsageError, match=words):
            grid(*sizes)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        Plan((), (1.5,))


def test_retrieving_rows_are_spread() -> None:
    for rows_, wanted in ((64, 0), (64, 1), (64, 8), (7, 3), (5, 5)):
        chosen = spread(rows_, wanted)
        assert len(chosen) == rows_ and int(chosen.sum()) == wanted
    assert spread(8, 2).nonzero().flatten().tolist() == [3, 7]


def test_rotation_does_not_fit_a_cache() -> None:
    for size in (1, 2**20, 2**28, 2**33):
        assert 2 <= copies_for(size) <= 64
    assert copies_for(2**24) * 2**24 >= 256 * 2**20


def test_cost_touches_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object, **kwargs: object) -> None:
        raise AssertionError("a device was touched")

    for name in ("randn", "rand", "full", "empty"):
        monkeypatch.setattr(torch, name, touched)
    found = cost(Plan(default_points(), (0.0, 1.0)), torch.bfloat16)
    assert len(found) == 4 and found[0]["gib"] > found[3]["gib"] > 0
    assert all(each["seconds"] > 0 and each["cases"] >= 10 for each in found)


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(session, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="none is available"):
        choose_device("auto")
    with pytest.raises(UsageError, match="not a CUDA device"):
        choose_device("cpu")
    monkeypatch.setattr(session, "has_triton", lambda: False)
    with pytest.raises(
        ResourceError, match="needs the package triton.* pip install -c constraints.txt triton"
    ):
        choose_device("cuda")
    monkeypatch.setattr(session, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_device("auto") == "cpu"
    with pytest.raises(UsageError, match="runs on the CPU"):
        choose_device("cuda:1")
    assert choose_dtype("auto", "cpu") == torch.float16 and choose_dtype("auto", "cuda") == torch.bfloat16
    with pytest.raises(UsageError, match="computes it wrongly"):
        choose_dtype("bfloat16", "cpu")
    with pytest.raises(UsageError, match="not one of"):
        choose_dtype("int8", "cuda")


@needs_triton
def test_gpu_check_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = child("-m", "prhs_kernels.bench.gpu_check", "--seconds", "300", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    checks = json.loads(out.read_text("utf-8"))["data"]["checks"]
    assert len(checks) == 14 and not [check for check in checks if check["error"]]
    assert "14 checks, 0 wrong" in done.stdout


def test_gpu_check_says_what_it_needs() -> None:
    done = child("-m", "prhs_kernels.bench.gpu_check", interpret="0")
    assert done.returncode == 4 and "needs" in done.stderr


PLANTED = """
import sys
import torch
from prhs_kernels.bench import operator
from prhs_kernels.bench.session import Session
from prhs_kernels.ops.sparse_decode import triton as kernel
right = kernel.sparse_decode
def wrong(*arguments):
    output, lse = right(*arguments)
    return output * 1.02, lse
kernel.sparse_decode = wrong
session = Session([], lambda rows: None)
assert operator.measure(operator.Plan(operator.toy_points(), (0.0,)), session, "cpu", torch.float16)
for row in session.rows:
    print(row["status"], row["timing"] is not None, row["case"], sep="|")
"""


@needs_triton
def test_a_wrong_kernel_is_never_timed() -> None:
    """Whole toy run with a sparse kernel whose output is 2 % too large: it and the layer are refused."""
    done = child("-c", PLANTED)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("|") for line in done.stdout.splitlines()]
    found = {case: (status, timing) for status, timing, case in lines}
    assert found["sparse_decode + merge"] == ("wrong", "False")
    assert found["layer, ρ = 0"] == ("wrong", "False")
    right = [case for case, seen in found.items() if seen == ("ok", "True")]
    assert {"dense_decode", "sdpa math", AS_GPT_FAST, "scan", "choose"} <= set(right)


PLANTED_STEP = """
import torch
from prhs_kernels.bench import decode
from prhs_kernels.bench.session import Session
from prhs_kernels.runtime import index_sets
right = index_sets.sparse_decode
def wrong(*arguments, **settings):
    output, lse = right(*arguments, **settings)
    return output * 1.05, lse
index_sets.sparse_decode = wrong
plan = decode.Plan(decode.toy_points(), (0.0,))
session = Session([], print, seconds=1e-9)
decode.cases = lambda *given, cases=decode.cases: list(cases(*given))[:1]
session.out_of_time = lambda: False
decode.measure(plan, session, "cpu", torch.float16)
(row,) = session.rows
print("FOUND", row["status"], row["timing"], row["error"])
"""


@needs_triton
def test_a_wrong_decode_step_is_never_timed() -> None:
    """Attention that is 5 % too large changes the logits by more than the precision does."""
    done = child("-c", PLANTED_STEP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FOUND wrong None wrong result, not timed: logits: error" in done.stdout


@torch.inference_mode()
def test_a_rival_runs_its_own_attention() -> None:
    """In every layer of every step; otherwise a benchmark would time our kernel under another name."""
    model: Any = tiny_model("llama", num_hidden_layers=3)
    called = []

    def attend(query: torch.Tensor, *_: Any) -> torch.Tensor:
        called.append(query.shape)
        return torch.zeros_like(query)

    settings: dict[str, Any] = {"batch_size": 2, "max_len": 20, "backend": "reference"}
    with rivals.OtherAttention(model, dense_params(model.config), attend=attend, **settings) as engine:
        engine.fill_random(9, seed=0)
        engine.step()
        engine.step()
    assert len(called) == 6


def test_random_models_have_the_size_of_their_shape() -> None:
    from prhs_kernels.bench.decode_cases import sparse_params
    from prhs_kernels.bench.models import random_model

    for family in ("llama", "mistral", "qwen2", "qwen3"):
        shape = ModelShape("tiny", family, 3, 8, 2, 64, 96, 112, 50)
        model = random_model(shape, 64, torch.float32, "cpu")
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
        assert matrices == shape.num_parameters, family
        assert shape.parameters_read == matrices - 50 * 96
        time = sparse_params(model, 60, 0.5).time
        assert time is not None and int((time.gate == 0).sum()) == 3  # half of 3 layers x 2 KV heads


def test_flops_of_a_prefill_with_dropped_tokens() -> None:
    """Against a count of every pair and every token, layer by layer."""
    from prhs_kernels.bench.prefill_model import cases

    shape = ModelShape("tiny", "llama", 4, 4, 2, 8, 24, 40, 50)
    full, psaw, etf = cases(Point(shape, 3, 100, 0), (0.5,))
    weights = (full.flops - full.attention_flops) / (2 * 3 * 100)
    assert weights == shape.num_parameters - 2 * 50 * 24
    assert full.attention_flops == 3 * 4 * (4 * 4 * 8 * 100 * 101 // 2)
    for case in (psaw, etf):
        params = case.params(shape)
        pairs = tokens = 0
        for layer in range(4):
            frozen = params.frozen_prefix(layer, 100)
            begin = params.window_start(layer, torch.arange(100)).tolist()
            tokens += 100 - frozen
            pairs += sum(
                1 for t in range(frozen, 100) for i in range(t + 1) if i < 4 or i >= begin[t] or i > t - 32
            )
        assert case.attention_flops == 3 * 4 * 4 * 8 * pairs
        assert case.flops == case.attention_flops + 2 * 3 * tokens * weights / 4
    assert etf.params(shape).frozen_prefix(3, 100) == 50  # the fraction asked for, in the last layer
    assert psaw.params(shape).window_start(3, torch.tensor(100)) == 50


def test_a_wrong_prefill_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose window is not the one that was asked for."""
    from prhs_kernels.bench import prefill_model

    case = prefill_model.cases(Point(TOY, 1, 80, 0), (0.5,))[1]
    assert prefill_model.run(case, "cpu", torch.float32)["timing"]
    right, seen = prefill_model.prefill, []

    def wrong(model: Any, params: Any, *given: Any) -> torch.Tensor:
        seen.append(given)
        return right(model, dataclasses.replace(params, depth=None) if len(seen) == 1 else params, *given)

    monkeypatch.setattr(prefill_model, "prefill", wrong)
    row = prefill_model.run(case, "cpu", torch.float32)
    assert row["timing"] is None and row["error"].startswith("wrong result, not timed: logits: error")


def test_choice_of_a_peer_is_checked() -> None:
    """Two heads that share one choice of pages of 4; near ties may go either way, clear ones not."""
    scores = torch.tensor([[[5.0, 1.0, 3.0, 2.995, 0.0]]])
    peer = peers.Peer(4, lambda i, wide: scores, margin=0.01)

    def positions(*pages: int) -> torch.Tensor:
        return torch.tensor([[[4 * page + i for page in pages for i in range(4)]] * 2])

    for pages in ((0, 2), (0, 3)):
        peers.check_choice(scores, positions(*pages), peer, 2)
    for pages, words in (((2, 3), "1 of the best units are missing"), ((0, 0), "chosen twice")):
        with pytest.raises(AssertionError, match=words):
            peers.check_choice(scores, positions(*pages), peer, 2)


def test_peers_choose_as_published() -> None:
    """Against the definitions, in float32 on the CPU, ragged sizes included."""
    problem = Problem("p", 2, 83, 8, 4, 32, 16)
    inputs = Inputs(problem, torch.float32, "cpu")
    query, keys, _ = inputs.kv(1)
    heads = query.view(2, 4, 2, 16)
    quest = peers._quest(inputs)
    pages = [keys[:, :, 16 * page : 16 * page + 16] for page in range(5)]
    bounds = torch.stack(
        [
            torch.maximum(heads * p.amin(2, keepdim=True), heads * p.amax(2, keepdim=True)).sum(-1).amax(2)
            for p in pages
        ],
        dim=-1,
    )
    torch.testing.assert_close(quest.scores(1, False), bounds)
    found = quest.indices(inputs, 1)
    assert found.shape == (2, 4, 32) and found.dtype == torch.int32
    assert (found[1, 2, ::16] // 16).tolist() == bounds[1, 2].topk(2).indices.sort().values.tolist()
    weights = (heads @ keys.mT * inputs.scale).softmax(-1).sum(2)
    shared = peers._hshare(2, inputs)
    torch.testing.assert_close(shared.scores(1, False).exp(), weights[:, ::2])
    sets = shared.indices(inputs, 1)
    assert torch.equal(sets[:, 0], sets[:, 1]) and not torch.equal(sets[:, 1], sets[:, 2])
    everything = peers._double_sparse(16, inputs)  # all channels: exact
    torch.testing.assert_close(everything.scores(1, False).exp(), weights)
    some = peers._double_sparse(4, inputs)
    assert not torch.equal(some.indices(inputs, 1), everything.indices(inputs, 1))

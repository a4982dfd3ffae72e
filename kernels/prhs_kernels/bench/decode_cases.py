"""Cases of whole decode steps: how each is made, checked against float64, and timed."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel

from prhs_kernels.bench import rivals, timing
from prhs_kernels.bench.cases import LOCAL, SINKS, Kind
from prhs_kernels.bench.dense_cases import AS_GPT_FAST
from prhs_kernels.bench.models import CHECK_POSITIONS, check_model, check_step
from prhs_kernels.bench.retrieval_cases import LONGEST_BLOCK, block_of, case_name, spread
from prhs_kernels.bench.shapes import TOY, ModelShape, Point
from prhs_kernels.bench.timing import Timing
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.retrieve.state import Decision
from prhs_kernels.params import Gate, SelectorParams, TimeParams
from prhs_kernels.runtime.attach import dense_params
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.runtime.stats import DecodeStats

STEPS = 24  # timed ones
BLOCKS = 5  # timed ones at least, where there is room
ROOM = 2 * LONGEST_BLOCK  # slots behind the context; not less than the steps of a case
Figures = tuple[Timing, float, dict[str, float]]  # time per step, bytes that it cannot avoid, values


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the point it is measured at."""

    model: PreTrainedModel
    point: Point
    dtype: torch.dtype
    device: str

    @property
    def settings(self) -> dict[str, Any]:
        """Of an engine; triton by name, or the interpreter would run the reference."""
        sizes = {"batch_size": self.point.batch, "max_len": self.point.context + ROOM}
        return {**sizes, "backend": "triton"}

    @property
    def kv_bytes(self) -> int:
        """What dense attention reads in a step."""
        return self.point.shape.kv_bytes(self.point.batch, self.point.context, self.dtype.itemsize)

    @property
    def weight_bytes(self) -> int:
        return self.point.shape.parameters_read * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: Kind
    run: Callable[[Subject], Figures]


def cases(point: Point, ratios: Sequence[float], kinds: Sequence[KeyCopyKind]) -> Iterator[Case]:
    """Most important first. Where nobody retrieves, no keys are scanned: then one kind is enough."""
    for ratio in ratios:
        share, block = _share(point.shape, ratio), block_of(ratio)
        for kind in kinds if share else kinds[:1]:
            yield Case(
                case_name("sparse", share, kind), "sparse", functools.partial(_sparse, share, kind, None)
            )
        for kind in kinds if block else ():
            run = functools.partial(_sparse, 0.0, kind, block)
            yield Case(case_name("sparse", ratio, kind, block), "sparse", run)
    yield Case("dense_decode", "dense", _dense)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if point.shape == TOY:
        backends = {"math": SDPBackend.MATH}
    for name, backend in backends.items():
        yield Case(f"sdpa {name}", "dense", functools.partial(_unmasked, backend))
    yield Case(AS_GPT_FAST, "masked", _transformers)
    yield Case("our step, masked sdpa", "masked", _masked)
    yield Case("time to first token, one prompt", "stage", _first_token)


def _share(shape: ModelShape, ratio: float) -> float:
    """The nearest retrieval ratio that a whole number of (layer, KV head) units has."""
    units = shape.num_layers * shape.num_kv_heads
    return round(ratio * units) / units


def sparse_params(
    model: PreTrainedModel, kept: int, share: float, kind: KeyCopyKind = KeyCopyKind.EXACT,
    block: int | None = None,
) -> SelectorParams:  # fmt: skip
    """Sets of about `kept` positions; this share of the (layer, KV head) units retrieves in every step, from
    keys of this kind, the others in every `block`-th, by default never again while a case runs."""
    params = dense_params(model.config)
    shape = params.num_layers, params.num_kv_heads
    never = spread(shape[0] * shape[1], round(share * shape[0] * shape[1])).view(shape)
    # dilation brings up to two thirds more
    k = max(1, (kept - SINKS - LOCAL) * 3 // 5)
    time_params = TimeParams(
        budget_ratio=torch.zeros(shape),
        budget_tokens=torch.full(shape, k, dtype=torch.int32),
        gate=torch.where(never, Gate.NEVER, Gate.POST_ROPE).to(torch.uint8),
        tau_cos=torch.full(shape, -1.0),
        block=torch.full(shape, block or ROOM, dtype=torch.int32),
        dilation=torch.ones(shape, dtype=torch.int32),
    )
    return dataclasses.replace(params, num_sinks=SINKS, num_local=LOCAL, time=time_params, key_copy=kind)


def _sparse(share: float, kind: KeyCopyKind, block: int | None, subject: Subject) -> Figures:
    model, kept = subject.model, subject.point.kept
    small = check_model(subject.point.shape, subject.dtype, subject.device)
    keep_all = sparse_params(small, 4 * CHECK_POSITIONS, share, kind)
    _check(DecodeEngine(small, keep_all, **_small_settings()), small)
    engine = DecodeEngine(model, sparse_params(model, kept, share, kind, block), **subject.settings)
    spent, num_bytes, values = _time(engine, subject, block)
    found, wanted = values["retrieval_ratio"], share or (1 / block if block else 0.0)
    assert abs(found - wanted) < 1e-6, f"{found:.4f} of the units retrieved instead of {wanted:.4f}"
    return spent, num_bytes, values


def _dense(subject: Subject) -> Figures:
    small = check_model(subject.point.shape, subject.dtype, subject.device)
    _check(DecodeEngine(small, dense_params(small.config), attention="dense", **_small_settings()), small)
    params = dense_params(subject.model.config)
    return _time(DecodeEngine(subject.model, params, attention="dense", **subject.settings), subject)


def _unmasked(backend: SDPBackend, subject: Subject) -> Figures:
    return _other(subject, lambda positions: rivals.unmasked(backend, positions))


def _masked(subject: Subject) -> Figures:
    return _other(subject, lambda positions: rivals.masked)


def _other(subject: Subject, attend: Callable[[int], rivals.Attend]) -> Figures:
    small = check_model(subject.point.shape, subject.dtype, subject.device)
    params = dense_params(small.config)
    _check(rivals.OtherAttention(small, params, attend=attend(CHECK_POSITIONS), **_small_settings()), small)
    params, context = dense_params(subject.model.config), subject.point.context
    engine = rivals.OtherAttention(subject.model, params, attend=attend(context), **subject.settings)
    return _time(engine, subject)


def _small_settings() -> dict[str, Any]:
    return {"batch_size": 2, "max_len": 2 * CHECK_POSITIONS, "backend": "triton"}


def _check(engine: DecodeEngine, model: PreTrainedModel) -> None:
    with engine:
        check_step(engine, model)


def _time(engine: DecodeEngine, subject: Subject, block: int | None = None) -> Figures:
    """Steps behind a random cache, or whole blocks of them. The first step captures and chooses every set; it
    is not counted, nor is its block."""
    point, more = subject.point, {}
    with engine:
        before = _allocated(subject.device)
        engine.fill_random(point.context - 1, seed=0)
        resident = _allocated(subject.device) - before
        for _ in range(block or 1):
            engine.step()
        started = engine.stats()
        if block:
            times, more["longest_step_us"] = _block_times(engine, block, subject.device)
        else:
            times = _step_times(engine.step, subject.device)
        stats = _difference(engine.stats(), started)
    read = stats.kv_bytes_read * subject.kv_bytes
    spent = Timing.of(times)
    values = {
        **stats.to_dict(),
        **more,
        "tokens_per_s": point.batch / spent.p50 * 1e6,
        "kv_read_bytes": read,
        "kv_resident_bytes": float(resident or engine_bytes(subject)),
    }
    return spent, subject.weight_bytes + read, values


def engine_bytes(subject: Subject) -> int:
    """Size of the engine's cache where no allocator counts (the interpreter)."""
    shape = subject.point.shape
    return shape.kv_bytes(subject.point.batch, subject.point.context + ROOM, subject.dtype.itemsize)


def _difference(after: DecodeStats, before: DecodeStats) -> DecodeStats:
    names = [field.name for field in dataclasses.fields(after)]
    return DecodeStats(**{name: getattr(after, name) - getattr(before, name) for name in names})


def _step_times(step: Callable[[], object], device: str) -> list[float]:
    """Microseconds per step: CUDA events on a GPU, a clock in the interpreter."""
    if device != "cpu":
        return timing.replay_times(step, STEPS)
    began = time.perf_counter()
    step()
    return [(time.perf_counter() - began) * 1e6]


def _block_times(engine: DecodeEngine, block: int, device: str) -> tuple[list[float], float]:
    """Microseconds per step of whole blocks, in each the mean, and their median longest step.

    Raises:
        AssertionError: other units retrieved than all of them in the first step of each block.
    """
    blocks = min(ROOM // block - 1, max(BLOCKS, STEPS // block)) if device != "cpu" else 1
    state, retrieved = engine.sets.stacked, []
    assert state is not None

    def look() -> None:
        retrieved.append((state.decision == Decision.RETRIEVE).sum())

    if device != "cpu":
        times = timing.replay_times(engine.step, blocks * block, before=look, warm=0)
    else:
        times = []
        for _ in range(blocks * block):
            look()
            times += _step_times(engine.step, device)
    look()
    found = [int(each) for each in retrieved[1:]]
    wanted = [state.decision.numel(), *[0] * (block - 1)] * blocks
    assert found == wanted, f"units that retrieved, by step: {found} instead of {wanted}"
    parts = [times[start : start + block] for start in range(0, len(times), block)]
    return [sum(part) / block for part in parts], Timing.of([max(part) for part in parts]).p50


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else 0


def _transformers(subject: Subject) -> Figures:
    small = check_model(subject.point.shape, subject.dtype, subject.device)
    _check_transformers(small, subject.device)
    point = subject.point
    before = _allocated(subject.device)
    run = rivals.TransformersStep(subject.model, point.batch, point.context - 1, point.context + ROOM)
    resident = _allocated(subject.device) - before
    run.fill(None, None, seed=0)
    if subject.device != "cpu":
        run.capture()
    spent = Timing.of(_step_times(run.step, subject.device))
    values = {
        "attended_fraction": 1.0,
        "tokens_per_s": point.batch / spent.p50 * 1e6,
        "kv_read_bytes": float(subject.kv_bytes),
        "kv_resident_bytes": float(resident or engine_bytes(subject)),
    }
    return spent, subject.weight_bytes + subject.kv_bytes, values


@torch.inference_mode()
def _check_transformers(model: PreTrainedModel, device: str) -> None:
    """Against our dense engine on the same cache, which itself is checked against float64."""
    params = dense_params(model.config)
    with DecodeEngine(model, params, attention="dense", **_small_settings()) as engine:
        engine.fill_random(CHECK_POSITIONS - 1, seed=1)
        run = rivals.TransformersStep(model, 2, CHECK_POSITIONS - 1, 2 * CHECK_POSITIONS)
        run.fill(engine.cache.keys, engine.cache.values, seed=1)
        run.token.copy_(engine.tokens[:, None])
        if device != "cpu":
            run.capture()
        run.step()
        engine.step()
        error = float((run.logits - engine.logits).abs().max() / engine.logits.abs().max())
    assert error < 0.05, f"logits of the two dense steps differ by {error:.3g} of the largest"


@torch.inference_mode()
def _first_token(subject: Subject) -> Figures:
    """Prefill of one prompt by transformers' modules, cache moved to static buffers, first token drawn."""
    point, model = subject.point, subject.model
    ids = torch.randint(point.shape.vocabulary, (1, point.context), device=model.device)
    params = dense_params(model.config)
    settings = subject.settings | {"batch_size": 1}
    with DecodeEngine(model, params, attention="dense", **settings) as engine:
        times = []
        for _ in range(3 if subject.device != "cpu" else 1):
            began = time.perf_counter()
            engine.start(engine.prefill(ids, torch.ones_like(ids))).cpu()
            times.append((time.perf_counter() - began) * 1e6)
    return Timing.of(times[1:] or times), 0, {}

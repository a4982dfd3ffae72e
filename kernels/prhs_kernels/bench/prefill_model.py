"""Prefill of whole random models: dense, under PSAW's window, and with ETF's frozen tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from prhs_kernels.bench.cases import describe
from prhs_kernels.bench.models import random_model
from prhs_kernels.bench.prefill_cases import LOCAL, SINKS, PrefillProblem, visible_pairs
from prhs_kernels.bench.shapes import ModelShape, Point
from prhs_kernels.bench.timing import Timing
from prhs_kernels.params import DepthParams, LayerParams, SelectorParams
from prhs_kernels.runtime.prefill import prefill
from prhs_kernels.testing.tolerances import assert_as_exact_as

REPEATS = 3
CHECKED_TOKENS = 150


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A prefill at a point. fraction: what `axis` (`""`, `PSAW`, `ETF`) drops in the last layer."""

    point: Point
    axis: str
    fraction: float

    @property
    def name(self) -> str:
        return self.axis or "full"

    @property
    def problem(self) -> PrefillProblem:
        shape, point = self.point.shape, self.point
        heads = shape.num_qo_heads, shape.num_kv_heads
        return PrefillProblem(shape.name, point.batch, point.context, *heads, shape.head_dim)

    @property
    def key(self) -> str:
        return f"{self.problem} | model, {self.name} | {self.fraction:g}"

    def params(self, shape: ModelShape) -> SelectorParams:
        """Schedules that begin in the middle layer and drop `fraction` in the last one."""
        start = (shape.num_layers - 1) // 2
        steps = max(1, shape.num_layers - 1 - start)
        base = (1 - self.fraction) ** ((shape.num_layers - start) / steps)
        heads = shape.num_qo_heads, shape.num_kv_heads
        params = SelectorParams(shape.num_layers, *heads, shape.head_dim, num_sinks=SINKS, num_local=LOCAL)
        if self.axis == "PSAW":
            return dataclasses.replace(params, depth=DepthParams(start, base))
        return dataclasses.replace(params, layer=LayerParams(start, base)) if self.axis else params

    @property
    def flops(self) -> int:
        """All multiplications and additions but the output layer's."""
        return sum(self._layer_flops())

    @property
    def attention_flops(self) -> int:
        return self._layer_flops()[0]

    def _layer_flops(self) -> tuple[int, int]:
        """Of attention, of the projections and feed-forward layers; over all layers."""
        shape, tokens = self.point.shape, self.point.context
        params = self.params(shape)
        weights = 2 * shape.hidden * shape.head_dim * (shape.num_qo_heads + shape.num_kv_heads)
        weights += 3 * shape.hidden * shape.ffn
        attention = linear = 0
        for layer in range(shape.num_layers):
            frozen = params.frozen_prefix(layer, tokens)
            fraction = params.depth.window_fraction(layer, shape.num_layers) if params.depth else 0.0
            pairs = visible_pairs(tokens, fraction, SINKS, LOCAL, first=frozen)
            attention += 4 * shape.num_qo_heads * shape.head_dim * pairs
            linear += 2 * (tokens - frozen) * weights
        return self.point.batch * attention, self.point.batch * linear


def cases(point: Point, fractions: tuple[float, ...]) -> list[ModelCase]:
    """The full prefill first."""
    dropped = [ModelCase(point, axis, fraction) for axis in ("PSAW", "ETF") for fraction in fractions]
    return [ModelCase(point, "", 0.0), *dropped]


def run(case: ModelCase, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A row of plain JSON; a wrong result is never timed, a failure becomes a row with its error."""
    full = ModelCase(case.point, "", 0.0)
    row: dict[str, Any] = {
        "key": case.key,
        "problem": dataclasses.asdict(case.problem),
        "case": case.name,
        "fraction": case.fraction,
        "flops": case.flops,
        "flops_saved": 1 - case.attention_flops / full.attention_flops,
        "all_flops_saved": 1 - case.flops / full.flops,
        "timing": None,
        "tflops": None,
        "error": "",
    }
    try:
        check(case, device, dtype)
        timing = _time(case, device, dtype)
    except AssertionError as error:
        return row | {"error": f"wrong result, not timed: {describe(error)}"}
    except Exception as error:  # the report says what failed
        return row | {"error": describe(error)}
    return row | {"timing": dataclasses.asdict(timing), "tflops": case.flops / timing.p50 / 1e6}


def check(case: ModelCase, device: str, dtype: torch.dtype) -> None:
    """A small model with the point's heads and this case's schedule, against the reference in float64."""
    small = dataclasses.replace(case.point.shape, num_layers=4, hidden=256, ffn=512, vocabulary=512)
    model = random_model(small, CHECKED_TOKENS, dtype, device)
    ids = torch.randint(small.vocabulary, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    params = case.params(small)
    found = _logits(model, params, ids.to(device)).cpu()
    host: Any = copy.deepcopy(model).cpu()
    stock = _logits(host, params, ids)
    exact = _logits(host.double(), params, ids)
    assert_as_exact_as(found, stock, exact, "logits")


def _logits(model: PreTrainedModel, params: SelectorParams, ids: torch.Tensor) -> torch.Tensor:
    """Of the last token of prompts `[batch, tokens]` without padding."""
    return prefill(model, params, ids, torch.ones_like(ids))[0]


def _time(case: ModelCase, device: str, dtype: torch.dtype) -> Timing:
    point = case.point
    model = _model(point.shape, point.context, dtype, device)
    ids = torch.randint(point.shape.vocabulary, (point.batch, point.context), device=device)
    times = []
    for _ in range(1 + REPEATS if device != "cpu" else 1):
        began = time.perf_counter()
        _logits(model, case.params(point.shape), ids).cpu()
        times.append((time.perf_counter() - began) * 1e6)
    return Timing.of(times[1:] or times)


@functools.lru_cache(maxsize=1)
def _model(shape: ModelShape, positions: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The point's model, kept until another point begins."""
    return random_model(shape, positions, dtype, device)


def forget() -> None:
    """Free the model."""
    _model.cache_clear()

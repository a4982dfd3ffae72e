"""Prefill attention of one layer under PSAW's window, timed against FlexAttention and full causal attention.

Every result is checked on sampled query rows against plain PyTorch and float64 before it is timed. Whole
prompts are bound by arithmetic, not by bytes: the figures are FLOP/s over the visible pairs of query and key,
and the part of full causal attention's FLOPs that the window saves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prhs_kernels.bench.timing import Timing, replay_times
from prhs_kernels.ops.window_prefill.api import window_prefill
from prhs_kernels.testing.tolerances import assert_as_exact_as

SINKS, LOCAL = 4, 32
FRACTIONS = (0.0, 0.25, 0.5, 0.75)
REPEATS = 10
CHECKED_ROWS = 64  # query rows that are compared, at each of two places

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class PrefillProblem:
    """One prefill of one layer: `batch` prompts of `tokens` tokens."""

    name: str
    batch: int
    tokens: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int = 128

    def __str__(self) -> str:
        heads = f"{self.num_qo_heads}/{self.num_kv_heads} heads, d {self.head_dim}"
        return f"{self.name}: batch {self.batch} x {self.tokens} tokens, {heads}"

    def flops(self, fraction: float) -> int:
        """Multiplications and additions of both matrix products over the visible pairs."""
        pairs = visible_pairs(self.tokens, fraction, SINKS, LOCAL)
        return 4 * self.batch * self.num_qo_heads * self.head_dim * pairs


PROBLEMS = [PrefillProblem("llama-3-8b", 1, tokens, 32, 8) for tokens in (8192, 32768)]
TOY_PROBLEMS = [PrefillProblem("toy", 1, 200, 4, 2, 64)]


def visible_pairs(tokens: int, fraction: float, num_sinks: int, num_local: int, first: int = 0) -> int:
    """Pairs of query and key of an unpadded prompt that the window leaves; queries from `first` on."""
    position = torch.arange(first, tokens)
    start = (position.double() * fraction).floor().long().minimum(position - num_local + 1).clamp(min=0)
    return int((position + 1 - start + start.clamp(max=num_sinks)).sum())


def prefill_rows(
    problem: PrefillProblem,
    device: str,
    dtype: torch.dtype,
    fractions: Sequence[float] = FRACTIONS,
    skip: Callable[[str], bool] = lambda key: False,
) -> Iterator[dict[str, Any]]:
    """A row of plain JSON per case, `key` identifying it; one that fails becomes a row with its error.

    Full causal attention by torch's backends first, then for every fraction our kernel and FlexAttention.
    `over_flash`: time of torch's flash backend (full causal) over the time of the case. A case for whose key
    `skip` is true does not run.
    """
    left = [case for case in _cases(problem, device, fractions) if not skip(_key(problem, *case[:2]))]
    if not left:
        return
    generator = torch.Generator(device).manual_seed(problem.tokens)
    heads = (problem.num_qo_heads, problem.num_kv_heads, problem.num_kv_heads)
    shapes = [(problem.batch, h, problem.tokens, problem.head_dim) for h in heads]
    qkv = tuple(torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes)
    flash = None
    for name, fraction, prepare in left:
        row = _row(problem, name, fraction, qkv, prepare, flash)
        if name == "sdpa flash" and row["timing"]:
            flash, row["over_flash"] = row["timing"]["p50"], 1.0
        yield row


def _cases(
    problem: PrefillProblem, device: str, fractions: Sequence[float]
) -> Iterator[tuple[str, float, Callable[[], Attention]]]:
    for name, prepare in _full_causal(problem, device).items():
        yield name, 0.0, prepare
    for fraction in fractions:
        yield "window_prefill", fraction, _ours(problem, fraction)
        if device != "cpu":  # uncompiled, FlexAttention makes all scores
            yield "flex_attention", fraction, _flex(problem, fraction)


def _key(problem: PrefillProblem, case: str, fraction: float) -> str:
    return f"{problem} | {case} | {fraction:g}"


def _ours(problem: PrefillProblem, fraction: float) -> Callable[[], Attention]:
    return lambda: functools.partial(
        window_prefill,
        scale=problem.head_dim**-0.5,
        window_fraction=fraction,
        num_sinks=SINKS,
        num_local=LOCAL,
        backend="triton",
    )


def _flex(problem: PrefillProblem, fraction: float) -> Callable[[], Attention]:
    """The same mask; its blocks are found once, untimed."""

    def prepare() -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask

        position = torch.arange(problem.tokens, device="cuda")
        start = (position.double() * fraction).floor().int()

        def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
            kept = (key < SINKS) | (key >= start[query]) | (key > query - LOCAL)
            return (key <= query) & kept

        blocks = create_block_mask(visible, None, None, problem.tokens, problem.tokens, device="cuda")
        scale = problem.head_dim**-0.5
        return functools.partial(_compiled_flex(), block_mask=blocks, scale=scale, enable_gqa=True)

    return prepare


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _full_causal(problem: PrefillProblem, device: str) -> dict[str, Callable[[], Attention]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(backend: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=problem.head_dim**-0.5, enable_gqa=True
            )

    backends: dict[str, Any] = {"sdpa math": SDPBackend.MATH}
    if device != "cpu":
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
        backends["sdpa"] = None  # what torch chooses by itself
    return {name: functools.partial(functools.partial, attend, b) for name, b in backends.items()}


def _row(
    problem: PrefillProblem,
    case: str,
    fraction: float,
    qkv: tuple[torch.Tensor, ...],
    prepare: Callable[[], Attention],
    flash: float | None,
) -> dict[str, Any]:
    flops = problem.flops(fraction)
    row = {
        "key": _key(problem, case, fraction),
        "problem": dataclasses.asdict(problem),
        "case": case,
        "fraction": fraction,
        "flops": flops,
        "flops_saved": 1 - flops / problem.flops(0.0),
        "timing": None,
        "tflops": None,
        "over_flash": None,
        "error": "",
    }
    try:
        attention = prepare()
        _check(problem, fraction, qkv, attention(*qkv))
        timing = _measure(lambda: attention(*qkv), qkv[0].is_cuda)
    except Exception as error:  # the report says what failed
        wrong = "wrong result, not timed: " if isinstance(error, AssertionError) else ""
        return {**row, "error": f"{wrong}{type(error).__name__}: {error}".splitlines()[0][:300]}
    figures = {"tflops": flops / timing.p50 / 1e6, "over_flash": flash and flash / timing.p50}
    return {**row, "timing": dataclasses.asdict(timing), **figures}


def _check(
    problem: PrefillProblem, fraction: float, qkv: tuple[torch.Tensor, ...], found: torch.Tensor
) -> None:
    """The last rows of the prompt, and the last rows of its first half."""
    query, keys, values = (tensor[:1] for tensor in qkv)
    for end in (problem.tokens, problem.tokens // 2):
        rows = slice(max(0, end - CHECKED_ROWS), end)
        part = (query[:, :, rows], keys[:, :, :end], values[:, :, :end])
        stock, exact = (
            window_prefill(
                *(tensor.to(dtype) for tensor in part),
                scale=problem.head_dim**-0.5,
                window_fraction=fraction,
                num_sinks=SINKS,
                num_local=LOCAL,
                backend="reference",
            )
            for dtype in (query.dtype, torch.float64)
        )
        assert_as_exact_as(found[:1, :, rows], stock, exact, f"rows up to {end}")


def _measure(call: Callable[[], object], on_gpu: bool) -> Timing:
    """Microseconds of single calls, far longer than a launch; in the interpreter one call, as a trial."""
    if on_gpu:
        return Timing.of(replay_times(call, REPEATS))
    began = time.perf_counter()
    call()
    return Timing.of([(time.perf_counter() - began) * 1e6])

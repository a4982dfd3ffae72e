"""Decode loops: prefill once, then one token at a time through a sparse cache, streaming."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.backend import Backend, use_triton
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.audit import Audit
from prhs_kernels.runtime.auditing import Auditor
from prhs_kernels.runtime.cache import PrhsCache
from prhs_kernels.runtime.distributed import launched
from prhs_kernels.runtime.engine import Attention, DecodeEngine, Mode
from prhs_kernels.runtime.floor import memory_bandwidth, step_floor
from prhs_kernels.runtime.sampling import Sampler, Sampling
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.runtime.support import engine_unsupported, sliding_windows
from prhs_kernels.selectors.base import StepSelector

AUDIT_SEED = 20_260_209  # of the audit's coin: nothing of a request, so that no one can tune it


@dataclasses.dataclass
class Generation:
    """A run of the decode loop; filled while `generate_tokens` is consumed. Times in seconds."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    time_to_first_token: float = float("nan")
    decode_seconds: float = 0.0
    kv_bytes_resident: int = 0
    kv_bytes_resident_dense: int = 0
    mode: Mode = "audited"  # or `released`; see docs/notation.md
    backend: str = "reference"  # what ran: `reference` or `triton`
    attention: Attention = "sparse"
    audit: Audit | None = None  # what was dropped, if that was asked for
    notes: list[str] = dataclasses.field(default_factory=list)  # what the user should hear, once
    stats: DecodeStats = dataclasses.field(default_factory=DecodeStats)

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second and sequence; the first token belongs to the prefill."""
        steps = self.new_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else float("nan")

    def to_dict(self) -> dict[str, float | int | str]:
        """Everything `prhs generate --stats` prints."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token": self.time_to_first_token,
            "tokens_per_second": self.tokens_per_second,
            **self.stats.to_dict(),
            "kv_bytes_resident": self.kv_bytes_resident,
            "kv_bytes_resident_dense": self.kv_bytes_resident_dense,
            "mode": self.mode,
            "backend": self.backend,
            "attention": self.attention,
        }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[batch, longest]` int64, shorter prompts padded on the left."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("every prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """What to continue and how; ids and mask `[batch, longest]` on the model's device."""

    model: PreTrainedModel
    params: SelectorParams
    ids: torch.Tensor
    mask: torch.Tensor
    prompt_steps: int
    limits: torch.Tensor  # [batch] int64 on the host, new tokens of each
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    run: Generation
    auditor: Auditor | None

    @property
    def max_new_tokens(self) -> int:
        return int(self.limits.max())


def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SelectorParams,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    run: Generation | None = None,
    selector: StepSelector | None = None,
    prompt_steps: int = 0,
    backend: Backend = "auto",
    mode: Mode = "audited",
    dense_fallback: bool = False,
    audit: float | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, one decode step at a time.

    Args:
        prompts: token ids of each sequence; different lengths are padded on the left.
        params: the selectors; `dense_params(model.config)` for dense attention.
        max_new_tokens: of every sequence, or of each.
        stop_token_ids: a sequence that produced one of them, or its last token, yields None from then on, and
            no longer counts.
        run: filled with counts and times while the iterator is consumed.
        selector: another method in the place of the axes of `params`, for a single prompt.
        prompt_steps: that many last tokens of every prompt are fed as decode steps, one at a time, so that
            the first new token too comes from one.
        backend: `auto` takes the decode engine with its kernels on CUDA where it can run this, the reference
            loop elsewhere; what ran, and why not the engine, is in `run`.
        mode: `released` frees what the windows no longer reach; by the engine, on any device.
        dense_fallback: let the engine attend to everything where shapes say that sparse attention cannot gain
            (`runtime.floor`); noted in `run`. Not for measuring a selector.
        audit: measure the mass that this share of the units drops, retrievals always; in mode `audited`. The
            counts are in `run.audit`.

    Raises:
        UnsupportedModelError, InputError, UsageError: see `sparse_attention`.
        ResourceError: `backend="triton"` where triton cannot run; not enough memory.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts) or min(limits, default=1) < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1, for all or for each prompt")
    if prompt_steps and not 0 < prompt_steps < min(map(len, prompts), default=0):
        raise UsageError(f"prompt_steps = {prompt_steps} must leave every prompt a token to prefill")
    if selector is not None and (backend == "triton" or mode == "released"):
        raise UsageError("a comparison selector runs on the reference, and releases nothing")
    if audit is not None and (selector is not None or mode == "released"):
        raise UsageError("an audit needs our own selectors and mode 'audited'")
    ids, mask = (tensor.to(model.device) for tensor in left_pad(prompts, pad_token_id))
    run = run if run is not None else Generation()
    run.mode = mode
    sampling = sampling or Sampling()
    auditor = None if audit is None else Auditor(audit, seed=AUDIT_SEED + launched().rank)
    request = _Request(
        model,
        params,
        ids,
        mask,
        prompt_steps,
        torch.tensor(limits),
        sampling,
        tuple(stop_token_ids),
        run,
        auditor,
    )
    run.attention = "dense" if params.is_dense else "sparse"
    if selector is None and _wants_engine(request, backend):
        if dense_fallback and not params.is_dense:
            _fall_back(request)
        return _engine_loop(request, backend)
    return _reference_loop(request, selector)


def _wants_engine(request: _Request, backend: Backend) -> bool:
    """Whether the engine runs this; if it was expected to and cannot, the run gets a note."""
    model, params = request.model, request.params
    triton = use_triton(backend, request.ids)
    if not triton and request.run.mode == "audited":
        return False
    reason = engine_unsupported(model, params, "triton" if triton else "reference")
    if request.auditor is not None and params.depth is not None:
        reason = "it cannot measure what lies below PSAW's window"
        if backend == "triton":
            raise UsageError(f"an audit with backend 'triton': {reason}; use 'auto' or 'reference'")
    if reason is None or backend == "triton" or request.run.mode == "released":
        return True  # the engine itself refuses what was asked for by name
    request.run.notes.append(f"decoding without the engine: {reason}")
    return False


def _fall_back(request: _Request) -> None:
    """Attend to everything if nothing is to be gained, and say so."""
    model, (batch, length) = request.model, request.ids.shape
    kv_len = length + request.max_new_tokens
    floor = step_floor(
        request.params,
        batch=batch,
        kv_len=kv_len,
        itemsize=model.dtype.itemsize,
        windows=sliding_windows(model),
        bandwidth=memory_bandwidth(model.device),
    )
    if floor.gains:
        return
    request.run.attention = "dense"
    request.run.notes.append(
        f"dense attention: at batch {batch} and {kv_len} positions its floor is {1e6 * floor.dense:.0f} µs a "
        f"step, that of sparse attention {1e6 * floor.sparse:.0f} µs"
    )


@torch.inference_mode()  # as a decorator it is off while the caller holds the token; a `with` would leak
def _engine_loop(request: _Request, backend: Backend) -> Iterator[list[int | None]]:
    """The token of a step is on its way to the host while the next step runs."""
    run, prefix = request.run, request.ids.shape[1] - request.prompt_steps
    run.prompt_tokens = int(request.mask.sum())
    began = time.perf_counter()
    with DecodeEngine(
        request.model,
        request.params,
        batch_size=request.ids.shape[0],
        max_len=request.ids.shape[1] + request.max_new_tokens,
        backend=backend,
        attention=run.attention,
        mode=run.mode,
        sampling=request.sampling,
        max_new_tokens=request.max_new_tokens,
        stop_token_ids=request.stop_token_ids,
        audit=None if request.auditor is None else request.auditor.audit.probability,
        audit_seed=AUDIT_SEED + launched().rank,
    ) as engine:
        run.backend = engine.backend
        logits = engine.prefill(request.ids[:, :prefix], request.mask[:, :prefix])
        engine.start(logits)
        for column in request.ids[:, prefix:].unbind(dim=1):
            engine.step(column)
        run.kv_bytes_resident, run.kv_bytes_resident_dense = engine.resident_bytes, engine.dense_bytes
        shown, limits = _Shown(request, began), request.limits.to(engine.device)
        ends = set(request.limits.tolist())
        pending = shown.send(engine)
        for step in range(request.max_new_tokens):
            current = pending
            if step + 1 < request.max_new_tokens:
                if step + 1 in ends:  # the engine itself knows of stop tokens only
                    engine.alive.logical_and_(limits > step + 1)
                engine.step()
                pending = shown.send(engine)
            tokens = shown.receive(current)
            if step + 1 == request.max_new_tokens or not shown.alive.any():
                run.stats, run.audit = engine.stats(), engine.audit()
            try:
                yield tokens
            except GeneratorExit:  # the caller has enough, for example at the limits of each sequence
                run.stats, run.audit = engine.stats(), engine.audit()
                raise
            if not shown.alive.any():
                return


class _Shown:
    """Tokens on their way to the host, and what the run records when they arrive."""

    def __init__(self, request: _Request, began: float) -> None:
        self._run, self._began = request.run, began
        self._stops = torch.tensor(request.stop_token_ids, dtype=torch.long)
        self._limits = request.limits
        self.alive = torch.ones(request.ids.shape[0], dtype=torch.bool)

    def send(self, engine: DecodeEngine) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying the tokens just drawn."""
        if engine.device.type != "cuda":
            return engine.tokens.clone(), None
        host = torch.empty(engine.tokens.shape, dtype=torch.long, pin_memory=True)
        host.copy_(engine.tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def receive(self, sent: tuple[torch.Tensor, torch.cuda.Event | None]) -> list[int | None]:
        """Wait for them, count and stop the clock."""
        tokens, event = sent
        if event is not None:
            event.synchronize()
        return self.record(tokens)

    def record(self, tokens: torch.Tensor) -> list[int | None]:
        """Tokens `[batch]` on the host, None for sequences that had ended; who ends with them is noted."""
        run, now = self._run, time.perf_counter()
        if run.new_tokens == 0:
            run.time_to_first_token, self._began = now - self._began, now
        run.decode_seconds = now - self._began
        run.new_tokens += 1
        shown = [int(t) if living else None for t, living in zip(tokens, self.alive, strict=True)]
        self.alive &= ~torch.isin(tokens, self._stops) & (run.new_tokens < self._limits)
        return shown


@torch.inference_mode()
def _reference_loop(request: _Request, selector: StepSelector | None) -> Iterator[list[int | None]]:
    model, run, ids, mask = request.model, request.run, request.ids, request.mask
    sampler = Sampler(request.sampling)
    run.prompt_tokens = int(mask.sum())
    shown = _Shown(request, time.perf_counter())
    with sparse_attention(model, request.params, selector=selector) as cache:
        run.stats, cache.backend = cache.stats, "reference"
        cache.auditor = request.auditor
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        left = _feed(model, cache, ids, mask, positions, request.prompt_steps)
        ids, positions = ids[:, left], positions[:, left]
        for _ in range(request.max_new_tokens):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            token = sampler(logits)
            tokens = shown.record(token.cpu())  # waits for the device, so the clock is honest
            run.kv_bytes_resident = cache.resident_bytes
            run.kv_bytes_resident_dense = cache.dense_bytes
            run.audit = None if cache.auditor is None else cache.auditor.audit
            yield tokens
            if not bool(shown.alive.any()):
                return
            cache.alive = shown.alive.to(ids.device)
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)


def _feed(
    model: PreTrainedModel,
    cache: PrhsCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    steps: int,
) -> slice:
    """Run the padded prompts up to their last forward pass; the part that is left for that one."""
    length = ids.shape[1]
    ends = range(length - steps, length)  # empty without steps: then the whole prompt is left
    starts = [0, *ends]
    for start, end in zip(starts, ends, strict=False):
        model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            logits_to_keep=1,
        )
    return slice(starts[-1], length)

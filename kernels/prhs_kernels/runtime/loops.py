"""The two decode loops: over the engine, where steps overlap with copies, and over transformers' modules."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from prhs_kernels.ops.backend import Backend
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.cache import PrhsCache
from prhs_kernels.runtime.distributed import launched
from prhs_kernels.runtime.engine import DecodeEngine
from prhs_kernels.runtime.generation import AUDIT_SEED, Request
from prhs_kernels.runtime.sampling import Sampler
from prhs_kernels.selectors.base import StepSelector


@torch.inference_mode()  # as a decorator it is off while the caller holds the token; a `with` would leak
def engine_loop(request: Request, backend: Backend) -> Iterator[list[int | None]]:
    """The token of a step is on its way to the host while the next step runs."""
    run, prefix = request.run, request.ids.shape[1] - request.prompt_steps
    run.prompt_tokens = int(request.mask.sum())
    began = time.perf_counter()
    with DecodeEngine(
        request.model,
        request.params,
        batch_size=request.ids.shape[0],
        max_len=request.ids.shape[1] + request.max_new_tokens,
        prompt_len=prefix,
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
        if run.mode == "released" and not engine.released_slots:
            run.notes.append(
                f"nothing to release: every layer still reaches every position of {prefix} tokens of prompt"
            )
        engine.start(logits)
        for column in request.ids[:, prefix:].unbind(dim=1):
            engine.step(column)
        run.kv_bytes_resident, run.kv_bytes_resident_dense = engine.resident_bytes, engine.dense_bytes
        shown, limits = Shown(request, began), request.limits.to(engine.device)
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


class Shown:
    """Tokens on their way to the host, and what the run records when they arrive."""

    def __init__(self, request: Request, began: float) -> None:
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
def reference_loop(request: Request, selector: StepSelector | None) -> Iterator[list[int | None]]:
    model, run, ids, mask = request.model, request.run, request.ids, request.mask
    sampler = Sampler(request.sampling)
    run.prompt_tokens = int(mask.sum())
    shown = Shown(request, time.perf_counter())
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

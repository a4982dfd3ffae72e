"""The decode loop: prefill once, then one token at a time through a sparse cache, streaming."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from prhs_kernels.errors import UsageError
from prhs_kernels.params import SelectorParams
from prhs_kernels.runtime.attach import sparse_attention
from prhs_kernels.runtime.cache import PrhsCache
from prhs_kernels.runtime.stats import DecodeStats
from prhs_kernels.selectors.base import StepSelector


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0, else nucleus sampling with a fixed seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature} must be >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be in (0, 1]")


class Sampler:
    """Draws tokens from `[batch, vocabulary]` logits, on the CPU: a seed means the same on every device."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Next token ids `[batch]` int64."""
        if self._sampling.temperature == 0:
            return logits.argmax(dim=-1)
        probs = (logits.float() / self._sampling.temperature).softmax(dim=-1).cpu()
        ordered, order = probs.sort(dim=-1, descending=True)
        # keep the smallest set that reaches top_p: a token stays if what came before it has not reached it
        ordered[ordered.cumsum(dim=-1) - ordered >= self._sampling.top_p] = 0.0
        drawn = torch.multinomial(ordered, 1, generator=self._generator)
        return order.gather(-1, drawn).squeeze(-1).to(logits.device)


@dataclasses.dataclass
class Generation:
    """A run of the decode loop; filled while `generate_tokens` is consumed. Times in seconds."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    time_to_first_token: float = float("nan")
    decode_seconds: float = 0.0
    kv_bytes_resident: int = 0
    kv_bytes_resident_dense: int = 0
    mode: str = "audited"  # nothing is released; see docs/notation.md
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
        }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[batch, longest]` int64, shorter prompts padded on the left."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("every prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@torch.inference_mode()  # as a decorator it is off while the caller holds the token; a `with` would leak
def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SelectorParams,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    run: Generation | None = None,
    selector: StepSelector | None = None,
    prompt_steps: int = 0,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, one decode step at a time.

    Args:
        prompts: token ids of each sequence; different lengths are padded on the left.
        params: the selectors; `dense_params(model.config)` for dense attention.
        stop_token_ids: a sequence that produced one of them yields None from then on.
        run: filled with counts and times while the iterator is consumed.
        selector: another method in the place of the axes of `params`, for a single prompt.
        prompt_steps: that many last tokens of every prompt are fed as decode steps, one at a time, so that
            the first new token too comes from one.

    Raises:
        UnsupportedModelError, InputError, UsageError: see `sparse_attention`.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    if prompt_steps and not 0 < prompt_steps < min(map(len, prompts), default=0):
        raise UsageError(f"prompt_steps = {prompt_steps} must leave every prompt a token to prefill")
    run = run if run is not None else Generation()
    sampler = Sampler(sampling or Sampling())
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long)
    ids, mask = (tensor.to(model.device) for tensor in left_pad(prompts, pad_token_id))
    run.prompt_tokens = int(mask.sum())
    alive = torch.ones(len(prompts), dtype=torch.bool)
    began = time.perf_counter()
    with sparse_attention(model, params, selector=selector) as cache:
        run.stats = cache.stats
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        left = _feed(model, cache, ids, mask, positions, prompt_steps)
        ids, positions = ids[:, left], positions[:, left]
        for step in range(max_new_tokens):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            token = sampler(logits)
            shown = token.cpu()  # waits for the device, so the clock below is honest
            now = time.perf_counter()
            if step == 0:
                run.time_to_first_token, began = now - began, now
            run.decode_seconds = now - began
            run.new_tokens += 1
            run.kv_bytes_resident = cache.resident_bytes
            run.kv_bytes_resident_dense = cache.dense_bytes
            yield [int(t) if living else None for t, living in zip(shown, alive, strict=True)]
            alive &= ~torch.isin(shown, stops)
            if not bool(alive.any()):
                return
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)


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

"""Drawing the next token, the same on every device: the randomness comes from the CPU before it is needed."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.next_token.reference import argmax


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0, else nucleus sampling with a fixed seed.

    streams: a name per sequence, which with the seed decides what it draws, whatever runs beside it; without
    names a sequence draws by its place in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    streams: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature} must be >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be in (0, 1]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def uniforms(self, steps: int, batch: int) -> torch.Tensor:
        """`[steps, batch]` float64 in [0, 1), what the first `steps` draws of this seed use; on the CPU."""
        if self.streams:
            rows = [_uniforms(_generator(self.seed, name), steps) for name in self.streams]
            return torch.stack(rows, dim=1)
        sampler = Sampler(self)
        return torch.stack([sampler.uniforms(batch) for _ in range(steps)])


def draw(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    """Token ids `[batch]` int64 of `[batch, vocabulary]` logits; no host sync, so also inside a CUDA graph.

    Inverse of the distribution function over tokens in falling order of probability, in float64, so that
    devices whose logits agree to the last bit also agree in the token. `uniforms` `[batch]`. Not for greedy
    sampling, which is `ops.next_token`.
    """
    probs = (logits.double() / sampling.temperature).softmax(dim=-1)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    # keep the smallest set that reaches top_p: a token stays if what came before it has not reached it
    kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
    reached = kept.cumsum(dim=-1)
    place = (reached <= uniforms[:, None] * reached[:, -1:]).sum(dim=-1, keepdim=True)
    return order.gather(-1, place.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


class Sampler:
    """`draw` with the uniforms of a seed, one row of them per call."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._streams = [_generator(sampling.seed, name) for name in sampling.streams]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Next token ids `[batch]` int64."""
        if self._sampling.greedy:
            return argmax(logits)
        return draw(logits, self._sampling, self.uniforms(logits.shape[0]).to(logits.device))

    def uniforms(self, batch: int) -> torch.Tensor:
        """The next row, `[batch]` float64."""
        if self._streams:
            return torch.cat([_uniforms(own, 1) for own in self._streams])
        return _uniforms(self._generator, batch)


def _uniforms(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))

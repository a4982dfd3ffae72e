"""Where the sequences of a batch stand and which token comes next: on the device, for a graph to hold."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.ops.backend import Backend
from prhs_kernels.ops.next_token.api import next_token
from prhs_kernels.runtime.sampling import Sampling, draw


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """What a step changes besides the cache, the sets and the counts, and how its tokens are drawn.

    slot: `[1]` int64, cache slot of the next token. token: `[batch]` int64, that token. alive: `[batch]`
    bool, no stop token yet. drawn: `[1]` int64, tokens sampled so far, one less than `draws` at most.
    uniforms: `[draws, batch]` float64, None when greedy. stop_ids: `[any]` int64.
    """

    slot: torch.Tensor
    token: torch.Tensor
    alive: torch.Tensor
    drawn: torch.Tensor
    draws: int
    sampling: Sampling
    uniforms: torch.Tensor | None
    stop_ids: torch.Tensor

    @classmethod
    def allocate(
        cls, batch: int, sampling: Sampling, draws: int, stop_token_ids: tuple[int, ...], device: torch.device
    ) -> Progress:
        """At the first slot; `draws` tokens at most are drawn of each sequence."""
        return cls(
            slot=torch.zeros(1, dtype=torch.long, device=device),
            token=torch.zeros(batch, dtype=torch.long, device=device),
            alive=torch.ones(batch, dtype=torch.bool, device=device),
            drawn=torch.zeros(1, dtype=torch.long, device=device),
            draws=draws,
            sampling=sampling,
            uniforms=None if sampling.greedy else sampling.uniforms(draws, batch).to(device),
            stop_ids=torch.tensor(stop_token_ids, dtype=torch.long, device=device),
        )

    def restart(self) -> None:
        """What comes next is the first token to be drawn, and every sequence goes on."""
        self.alive.fill_(True)
        self.drawn.zero_()

    def draw(self, logits: torch.Tensor, backend: Backend, steps: bool = False) -> None:
        """The next token of every sequence, from logits `[batch, vocabulary]`; `steps`: and a new slot."""
        slot, last = self.slot if steps else None, self.draws - 1
        if self.uniforms is None:
            next_token(
                logits, self.token, self.alive, self.drawn,
                stop_ids=self.stop_ids, last_draw=last, slot=slot, backend=backend,
            )  # fmt: skip
            return
        token = draw(logits, self.sampling, self.uniforms.index_select(0, self.drawn)[0])
        self.token.copy_(token)
        self.drawn.add_(1).clamp_(max=last)
        if len(self.stop_ids):
            stopped = (token[:, None] == self.stop_ids).any(dim=-1)
            self.alive.logical_and_(~stopped)
        if steps:
            self.slot.add_(1)

    def changing(self) -> list[torch.Tensor]:
        """Every tensor that a step writes."""
        return [self.slot, self.token, self.alive, self.drawn]

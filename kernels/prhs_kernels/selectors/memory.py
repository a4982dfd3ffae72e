"""What a comparison method has besides the step at hand: the prefilled prompt and its own notes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import torch

from prhs_kernels.ops.sparse_decode.reference import grouped_scores

CHUNK = 256  # prompt rows whose attention is computed together; bounds the memory for probabilities


@dataclasses.dataclass(frozen=True, eq=False)
class PromptRows:
    """One layer's prefill of one unpadded sequence: what methods that look at the prompt's attention need.

    query: `[num_qo_heads, length, head_dim]` after RoPE; keys: `[num_kv_heads, length, head_dim]`.
    scale: what dot products are multiplied by. sliding_window: the model's own, in positions, or None.
    """

    query: torch.Tensor
    keys: torch.Tensor
    scale: float
    sliding_window: int | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.keys.shape[1]

    def probs(self, positions: torch.Tensor) -> torch.Tensor:
        """Dense attention of some prompt rows, mean over each group's query heads.

        positions: `[rows]` int64. Returns `[num_kv_heads, rows, length]` in fp32 or wider.
        """
        scores = grouped_scores(self.query[None, :, positions], self.keys[None], self.scale)[0]
        return scores.masked_fill(~self.visible(positions), -torch.inf).softmax(-1).mean(1)

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """What dense attention of some prompt rows covers, `[rows, length]` bool."""
        key = torch.arange(self.length, device=positions.device)
        seen = key <= positions[:, None]
        return (
            seen if self.sliding_window is None else seen & (key > positions[:, None] - self.sliding_window)
        )

    @functools.cached_property
    def received(self) -> torch.Tensor:
        """Attention that each position received from the whole prompt, `[num_kv_heads, length]`."""
        rows = torch.arange(self.length, device=self.keys.device)
        return torch.stack([self.probs(part).sum(1) for part in rows.split(CHUNK)]).sum(0)


@dataclasses.dataclass(eq=False)
class Memory:
    """Of one method on one prompt. Layers see the steps of a run in order, then comes the next run.

    prompts: layer -> its prefill; filled before the first step, empty where the queries were not kept.
    notes: what the method writes down itself, usually by layer; empty before the first step.
    """

    prompts: dict[int, PromptRows] = dataclasses.field(default_factory=dict)
    notes: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

"""SnapKV: the prompt's last rows vote once which prompt positions stay."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank


@dataclasses.dataclass(frozen=True)
class SnapKV(Baseline):
    """Prompt positions by the pooled votes of an observation window (Li et al., arXiv:2404.14469).

    The last `window` rows of the prompt vote with their attention for the positions before them; votes are
    max-pooled over `kernel` neighbours; the best stay, with the window itself, and so does whatever is
    generated.

    Ours: a group of query heads shares one set, by the mean vote of its heads (published: one per head).
    Where a question is fed in decode steps behind the prompt, it cannot vote; the publication compresses
    after it.
    """

    window: int = 32  # prompt rows
    kernel: int = 7  # positions, odd
    name = "snapkv"
    reads_prompt = True
    exact = False  # the share of what is generated grows

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """1,024 prompt positions, the smallest of the published 1,024, 2,048 and 4,096."""
        return (AtBudget(self, tokens=1024),)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """The size of the first step is what the prompt keeps; nothing is scored while decoding."""
        if rows.layer not in rows.memory.notes and len(rows.positions):
            rows.memory.notes[rows.layer] = self._of_prompt(rows, size[:, 0])
        stays = rows.memory.notes.get(rows.layer)
        kept = rows.visible.expand(rows.num_kv_heads, -1, -1)
        if stays is not None:
            stays = torch.nn.functional.pad(stays, (0, kept.shape[-1] - stays.shape[-1]), value=True)
            kept = kept & stays[:, None]
        return rows.chosen(kept, size, retrieved=False)

    def _of_prompt(self, rows: DecodeRows, capacity: torch.Tensor) -> torch.Tensor:
        """Prompt positions that stay, `[num_kv_heads, length]` bool, for `capacity [num_kv_heads]`."""
        prompt = rows.prompt
        position = torch.arange(prompt.length, device=rows.keys.device)
        start = max(prompt.length - self.window, 0)
        votes = prompt.probs(position[start:]).sum(1)[:, :start]
        if start:
            votes = torch.nn.functional.max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        # more than any position can gather, and the newest first where not even the window fits
        observers = (self.window + 1 + position[start:]).to(votes.dtype).expand(len(votes), -1)
        ranked = torch.cat([votes, observers], dim=-1)
        return falling_rank(ranked, torch.ones_like(position, dtype=torch.bool)) < capacity[:, None]

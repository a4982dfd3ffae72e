"""H2O: evict what has gathered the least attention."""

from __future__ import annotations

import dataclasses

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank


@dataclasses.dataclass(frozen=True)
class H2O(Baseline):
    """Heavy hitters by accumulated attention, and a local window (Zhang et al., arXiv:2306.14048).

    Every position gathers the attention that it receives, first from all prompt rows, then from each step's
    own sparse attention. What falls out of the local window competes for the rest of the size; what loses is
    evicted and never comes back. Half of the size is local, as published.

    Ours: a group of query heads shares one set and one score, the mean over its heads (published for one set
    per head); eviction comes before the step's attention instead of after it, so that no step attends to more
    than `size`.
    """

    local_share: float = 0.5
    name = "h2o"
    reads_prompt = True

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """A fifth of the prompt, a tenth heavy and a tenth recent, however much is generated."""
        return (AtBudget(self, fraction=0.2, of_prompt=True),)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """Exactly `min(size, visible)`, unless the size grows faster than positions arrive.

        Nothing is scored; one accumulated score per kept position is read.
        """
        length = rows.keys.shape[1]
        alive, score = self._carried(rows, length)
        kept = torch.zeros(rows.num_kv_heads, len(rows.positions), length, dtype=torch.bool).to(alive.device)
        key = torch.arange(length, device=alive.device)
        local = (size * self.local_share).ceil().long()
        for step, position in enumerate(rows.positions.tolist()):
            alive[:, position] = True
            alive &= rows.visible[step]
            recent = alive & (key > position - local[:, step, None])
            room = size[:, step, None] - recent.sum(-1, keepdim=True)
            older = alive & ~recent
            alive = recent | (older & (falling_rank(score, older) < room))
            kept[:, step] = alive
            mass = rows.by_group(rows.dense_probs)[:, :, step] * alive[:, None]
            score = score + (mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)).mean(1)
        rows.memory.notes[rows.layer] = alive, score
        accumulators = -(-kept.sum(-1) // rows.keys.shape[2])
        return rows.chosen(kept, size, retrieved=False, extra_rows=accumulators)

    @staticmethod
    def _carried(rows: DecodeRows, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Who is alive and what each position has gathered, `[num_kv_heads, length]` each."""
        if rows.layer in rows.memory.notes:
            alive, score = rows.memory.notes[rows.layer]
        else:
            score = rows.prompt.received
            alive = torch.ones_like(score, dtype=torch.bool)
        grown = length - alive.shape[-1]
        return torch.nn.functional.pad(alive, (0, grown)), torch.nn.functional.pad(score, (0, grown))

"""HShare: one retrieval serves other heads, other layers and the next steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch

from prhs_kernels.selectors.base import Choice
from prhs_kernels.selectors.baselines.method import AtBudget, Baseline, everything
from prhs_kernels.selectors.baselines.rows import DecodeRows, falling_rank
from prhs_kernels.selectors.memory import PromptRows

SAMPLES = 32  # prompt rows on which critical sets are compared


class Split(NamedTuple):
    """Of a size: sinks, heavy and local positions, each of the size's shape."""

    sinks: torch.Tensor
    heavy: torch.Tensor
    local: torch.Tensor


@dataclasses.dataclass(frozen=True)
class HShare(Baseline):
    """Critical indices shared over steps, heads and layers (Wu et al., ICLR 2025, openreview Tb5PY5vwp6).

    Sinks, a local window, and heavy positions retrieved every `block` steps; in between the set stays and the
    window grows. Layers and heads whose critical sets on the prompt overlap most with those of an earlier one
    take that one's set: pairs are picked greedily, until the asked shares are reached.

    Ours: a group of query heads shares one set, by its mean attention, and heads are KV heads; a retrieval
    scores exact keys (published code: 32 of 128 label channels in 4 bits, a cheaper and worse estimate);
    critical sets are compared on up to 32 evenly spaced rows of the prompt's second half (published code: all
    rows, between heads those behind the first `heavy`); steps are counted from the end of the prompt
    (published code: from the first position).
    """

    block: int = 2  # steps
    head_share: float = 0.5  # of the KV heads of a layer that take another one's set
    layer_share: float = 0.5
    name = "hshare"
    reads_prompt = True

    @property
    def published(self) -> tuple[AtBudget, ...]:
        """128 = 8 + 88 + 32 and 512 = 16 + 432 + 64 sinks, heavy and local positions."""
        return AtBudget(self, tokens=128), AtBudget(self, tokens=512)

    @staticmethod
    def split(size: torch.Tensor) -> Split:
        """Sinks and local window: in proportion up to 128, then as the square root, as published at 512."""
        scale = size.double() / 128
        scale = scale.minimum(scale.sqrt())
        local = (32 * scale).round().long().clamp(min=1)
        sinks = (8 * scale).round().long().minimum(size - local)
        return Split(sinks, size - local - sinks, local)

    def select(self, rows: DecodeRows, size: torch.Tensor) -> Choice:
        """`size` positions at a retrieval, up to `block - 1` more until the next; heads that retrieve score
        every key."""
        if not len(rows.positions):
            return everything(rows)
        notes = rows.memory.notes
        if "sharing" not in notes:
            notes["sharing"] = self._sharing(rows.memory.prompts, rows.prompt.length, size[:, 0])
        layers, heads = notes["sharing"]
        source, source_head = layers[rows.layer], heads[rows.layer]
        fresh = (rows.positions - rows.prompt.length) % self.block == 0
        if source == rows.layer:
            own = torch.tensor([head == at for at, head in enumerate(source_head)], device=fresh.device)
            base = self._base(rows, size, fresh)[source_head]
        else:
            own = torch.zeros(rows.num_kv_heads, dtype=torch.bool, device=fresh.device)
            base = notes["base", source]
        notes["base", rows.layer] = base
        retrieved = own[:, None] & fresh
        kept = self._kept(rows, base, fresh)
        return rows.chosen(kept, size, retrieved=retrieved, extra_rows=retrieved * rows.num_visible)

    def _base(self, rows: DecodeRows, size: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """What retrievals keep, `[num_kv_heads, retrievals, kv_len_max]` bool; later positions stay in."""
        sinks, _, local = (part[..., None] for part in self.split(size[:, fresh]))
        key = torch.arange(rows.keys.shape[1], device=rows.keys.device)
        always = (key < sinks) | (key > rows.positions[fresh, None] - local)
        visible = rows.visible[fresh]
        room = size[:, fresh, None] - (always & visible).sum(-1, keepdim=True)
        middle = visible & ~always
        return always | (middle & (falling_rank(rows.group_mass[:, fresh], middle) < room))

    @staticmethod
    def _kept(rows: DecodeRows, base: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Each step's set: what the last retrieval kept, of this run or of the one before."""
        last = fresh.cumsum(0)
        # the first step behind the prompt retrieves, so nothing is carried into it
        nothing = base.new_zeros(rows.num_kv_heads, 0)
        carried = rows.memory.notes.get(("last", rows.layer), nothing)
        carried = torch.nn.functional.pad(carried, (0, base.shape[-1] - carried.shape[-1]), value=True)
        table = torch.cat([carried[:, None], base], dim=1)
        rows.memory.notes["last", rows.layer] = table[:, -1]
        return table[:, last] & rows.visible

    def _sharing(
        self, prompts: Mapping[int, PromptRows], length: int, size: torch.Tensor
    ) -> tuple[list[int], list[list[int]]]:
        """Whose set each layer takes, and in each layer each KV head."""
        at = torch.linspace(length // 2, length - 1, min(SAMPLES, length - length // 2)).round().long()
        at = at.to(size.device)
        sinks, heavy, local = (part[:, None, None] for part in self.split(size))
        key = torch.arange(length, device=size.device)
        inner = (key <= at[:, None] - local) & (key >= sinks)
        critical = []
        for layer in sorted(prompts):
            middle = inner & prompts[layer].visible(at)
            critical.append(((falling_rank(prompts[layer].probs(at), middle) < heavy) & middle).float())
        heads = [
            share_greedily(torch.einsum("irn,jrn->ij", sets, sets), round(self.head_share * len(sets)))
            for sets in critical
        ]
        flat = torch.stack([sets.flatten() for sets in critical])
        return share_greedily(flat @ flat.T, round(self.layer_share * len(critical))), heads


def share_greedily(overlap: torch.Tensor, count: int) -> list[int]:
    """For each of n its source, itself or an earlier one; `count` of them share. overlap: `[n, n]`.

    The most similar pair comes first. Who shares is no source any more: its followers take its source.
    """
    table = overlap.masked_fill(torch.ones_like(overlap, dtype=torch.bool).triu(), -torch.inf)
    source = list(range(len(table)))
    for _ in range(min(count, len(table) - 1)):
        best = int(table.argmax())
        follower, taken = divmod(best, len(table))
        source = [taken if one == follower else one for one in source]
        table[follower] = -torch.inf
        table[:, follower] = -torch.inf
    return source

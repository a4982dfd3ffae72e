"""Accumulators over decode rows of many prompts: pure sums, so that a second prompt always changes the
result.

Each takes `LayerObservation`s of dense open-loop rows and never keeps a row. Shapes use L layers and H KV
heads.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from prhs_kernels.ops.retrieve import reference as retrieve
from prhs_kernels.params import Gate
from prhs_kernels.runtime.attention import LayerObservation

# Relative budgets at which a head's loss is measured; 1 is a dense head.
BUDGET_RATIOS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55, 1.0)
# Window starts and frozen fractions, relative to the query position and the prompt length.
FRACTIONS = tuple(i / 20 for i in range(20))
NUM_BINS = 20  # relative positions of the similarity statistics
TAIL_SHARE = 0.05  # of a prompt's decode steps: the worst ones, where what a head is there for gets lost
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of the cosine
BLOCKS = (2, 4, 8, 16, 32)  # decode steps


@dataclasses.dataclass(frozen=True)
class GateSetting:
    """One way of sharing: which cosine, the threshold, the block length s and the dilation radius r."""

    gate: Gate
    tau_cos: float
    block: int
    dilation: int


def gate_settings() -> tuple[GateSetting, ...]:
    """The settings that calibration compares: per-step retrieval, then both cosines at several s, τ and r."""
    shared = itertools.product(tuple(Gate)[1:], THRESHOLDS, BLOCKS, (0, 1))
    never = [GateSetting(Gate.NEVER, 1.0, 1, radius) for radius in (0, 1)]
    return (*never, *(GateSetting(*setting) for setting in shared))


def budget_sizes(num_visible: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """The k of every ratio, `[steps, ratios]`, from what each step sees and may choose from, `[steps]`."""
    ratios = torch.tensor(BUDGET_RATIOS, device=num_visible.device)  # fp32, as a bundle stores them
    wanted = (num_visible[:, None].double() * ratios).floor().long()
    return torch.minimum(wanted, available[:, None])


def worst_steps(loss: np.ndarray) -> np.ndarray:
    """Mean over the worst `TAIL_SHARE` of the steps (last axis), at least one of them."""
    steps = loss.shape[-1]
    count = max(1, round(TAIL_SHARE * steps))
    return np.asarray(np.partition(loss, steps - count, axis=-1)[..., steps - count :].mean(-1))


class TimeStatistics:
    """What sharing and truncation cost each head: loss, its tail, kept fraction and retrieval ratio (CIS).

    After the last prompt: `loss`, `tail`, `kept` `[settings, ratios, L, H]` (dropped mass, averaged over the
    group: mean over the steps, mean over the worst `TAIL_SHARE` of each prompt's steps; mean kept fraction)
    and `retrieval_ratio` `[settings, L, H]`, all float64. `cosine` `[2, distances, L, H]` is the mean of the
    smallest cosine in the group between queries 1, 2, 4 and 8 steps apart, after and before RoPE.
    """

    DISTANCES = (1, 2, 4, 8)

    def __init__(self, num_layers: int, num_kv_heads: int, num_sinks: int, num_local: int) -> None:
        self.settings = gate_settings()
        self.num_sinks, self.num_local = num_sinks, num_local
        heads = (num_layers, num_kv_heads)
        self._loss = np.zeros((len(self.settings), len(BUDGET_RATIOS), *heads))
        self._tail, self._kept = np.zeros_like(self._loss), np.zeros_like(self._loss)
        self._retrieved = np.zeros((len(self.settings), *heads))
        self._cosine = np.zeros((2, len(self.DISTANCES), *heads))
        self.prompts = np.zeros(num_layers, dtype=np.int64)

    def add(self, rows: LayerObservation) -> None:
        """Add one layer of one prompt; every prompt weighs the same whatever its length."""
        layer = rows.layer
        loss, kept = self._shared_loss(rows)
        cosines = {
            Gate.POST_ROPE: _group_cosine(rows.query, loss.shape[2]),
            Gate.PRE_ROPE: _group_cosine(rows.query_pre, loss.shape[2]),
        }
        steps = np.arange(loss.shape[3])
        heads = np.arange(loss.shape[2])[:, None]
        for index, (setting, anchor) in enumerate(
            zip(self.settings, _anchors(cosines, self.settings), strict=True)
        ):
            dropped = loss[setting.dilation][:, heads, steps, anchor]
            self._loss[index, :, layer] += dropped.mean(-1)
            self._tail[index, :, layer] += worst_steps(dropped)
            self._kept[index, :, layer] += kept[setting.dilation][:, heads, steps, anchor].mean(-1)
            self._retrieved[index, layer] += (anchor == steps).mean(-1)
        for kind, gate in enumerate((Gate.POST_ROPE, Gate.PRE_ROPE)):
            for place, distance in enumerate(self.DISTANCES):
                if distance < len(steps):
                    diagonal = np.diagonal(cosines[gate], -distance, axis1=1, axis2=2)
                    self._cosine[kind, place, layer] += diagonal.mean(-1)
        self.prompts[layer] += 1

    def _shared_loss(self, rows: LayerObservation) -> tuple[np.ndarray, np.ndarray]:
        """Dropped mass and kept fraction of step t under the set of step a: `[2, ratios, H, t, a]`, r = 0 and
        1.

        Only a <= t means anything.
        """
        num_heads, steps, n = rows.kept.shape
        allowed = rows.kept[0]  # what depth and the model's own window leave; the same for every head
        keys = torch.arange(n, device=allowed.device)
        sinks = allowed & (keys < self.num_sinks)
        local = allowed & (keys > rows.positions[:, None] - self.num_local)
        middle = allowed & ~sinks & ~local
        weights = rows.dense_probs.view(num_heads, -1, steps, n)
        ranks = self._ranks(weights, allowed, middle)
        sizes = budget_sizes(rows.visible.sum(-1), middle.sum(-1))
        mass = weights.mean(dim=1)  # [H, t, n]: the loss is linear, so the group can be averaged first
        in_window = mass * allowed
        always = (in_window * sinks).sum(-1)
        upto = in_window.cumsum(-1)
        # local of step t under anchor a: everything above a - num_local
        below = (rows.positions - self.num_local).clamp(min=-1)
        recent = upto[..., -1:] - torch.where(below >= 0, upto[..., below.clamp(min=0)], 0.0)
        floor = (below + 1).clamp(min=self.num_sinks)
        seen = rows.visible.sum(-1)
        fixed = sinks.sum(-1)[:, None] + (rows.positions[:, None] + 1 - floor[None, :]).clamp(min=0)
        in_window[..., : self.num_sinks] = 0.0
        losses, kepts = [], []
        for radius, place in itertools.product((0, 1), range(len(BUDGET_RATIOS))):
            chosen = ranks < sizes[:, place].view(1, -1, 1)
            chosen &= ranks >= 0
            if radius:
                limit = sizes[:, place].expand(num_heads, -1)
                chosen = retrieve.dilate(
                    torch.where(chosen, ranks, -1),
                    limit,
                    torch.ones_like(limit),
                    middle.expand(num_heads, -1, -1),
                )
            retained = torch.matmul(in_window, chosen.to(mass.dtype).transpose(1, 2))
            losses.append((1.0 - always[..., None] - recent - retained).clamp(min=0.0))
            kepts.append((fixed + chosen.sum(-1)[:, None, :]).double() / seen[:, None])
        shape = (2, len(BUDGET_RATIOS), num_heads, steps, steps)
        return torch.stack(losses).view(shape).cpu().numpy(), torch.stack(kepts).view(shape).cpu().numpy()

    @staticmethod
    def _ranks(weights: torch.Tensor, allowed: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        """Ranks of the middle positions, -1 elsewhere: `[H, steps, n]`."""
        inside = weights * allowed
        importance = (inside / inside.sum(-1, keepdim=True)).sum(dim=1)
        heads, available = importance.shape[0], middle.sum(-1)
        return retrieve.top_positions(importance, middle.expand(heads, -1, -1), available.expand(heads, -1))

    @property
    def loss(self) -> np.ndarray:
        return self._loss / self._count()

    @property
    def tail(self) -> np.ndarray:
        return self._tail / self._count()

    @property
    def kept(self) -> np.ndarray:
        return self._kept / self._count()

    @property
    def retrieval_ratio(self) -> np.ndarray:
        return self._retrieved / self._count()

    @property
    def cosine(self) -> np.ndarray:
        return self._cosine / self._count()

    def _count(self) -> np.ndarray:
        return np.maximum(self.prompts, 1)[:, None]


def _group_cosine(query: torch.Tensor, num_kv_heads: int) -> np.ndarray:
    """Smallest cosine in each group between all pairs of steps: `[H, steps, steps]`."""
    unit = torch.nn.functional.normalize(query[0].double(), dim=-1)
    pairs = torch.matmul(unit, unit.transpose(-1, -2))
    return pairs.view(num_kv_heads, -1, *pairs.shape[1:]).amin(dim=1).cpu().numpy()


def _anchors(cosine: dict[Gate, np.ndarray], settings: tuple[GateSetting, ...]) -> np.ndarray:
    """Anchor of every step under every setting, `[settings, H, steps]`.

    The rule of `selectors.cis` with re-anchoring, for all settings at once. cosine: `[H, steps, steps]` of
    each gate.
    """
    num_heads, steps = next(iter(cosine.values())).shape[:2]
    block = np.array([setting.block for setting in settings])[:, None]
    tau = np.array([setting.tau_cos for setting in settings])[:, None]
    kind = np.array([max(setting.gate - 1, 0) for setting in settings])[:, None]  # of NEVER: its block is 1
    table = np.stack([cosine[gate] for gate in tuple(Gate)[1:]])
    anchor = np.zeros((len(settings), num_heads, steps), dtype=np.int64)
    heads = np.arange(num_heads)[None, :]
    for step in range(1, steps):
        last = anchor[:, :, step - 1]
        share = (step - last < block) & (table[kind, heads, step, last] > tau)
        anchor[:, :, step] = np.where(share, last, step)
    return anchor


class DepthStatistics:
    """Mass below a relative window start, and how layers resemble the one below (PSAW, ETF).

    After the last prompt: `window_loss` `[L, fractions]`, mean mass of a decode query on non-sink positions
    older than `fraction * t`; `share_loss` `[L, fractions]`, mean total variation when the first `fraction`
    of the prompt takes the keys of the layer below; `similarity_key`, `similarity_value` `[L, NUM_BINS]`,
    mean cosine with the layer below by relative position (row 0 is NaN).
    """

    def __init__(self, num_layers: int, num_sinks: int, num_local: int) -> None:
        self.num_sinks, self.num_local = num_sinks, num_local
        self._window = np.zeros((num_layers, len(FRACTIONS)))
        self._share = np.zeros((num_layers, len(FRACTIONS)))
        self._similarity = np.zeros((2, num_layers, NUM_BINS))
        self._below: LayerObservation | None = None
        self.prompts = np.zeros(num_layers, dtype=np.int64)

    def add(self, rows: LayerObservation) -> None:
        """Add one layer of one prompt; layers of a prompt come in order."""
        self._window[rows.layer] += self._window_loss(rows)
        if rows.layer > 0 and self._below is not None:
            prompt = int(rows.positions[0])
            self._share[rows.layer] += self._share_loss(rows, self._below.keys, prompt)
            for kind, name in enumerate(("keys", "values")):
                ours, theirs = getattr(rows, name)[0, :, :prompt], getattr(self._below, name)[0, :, :prompt]
                cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1).mean(0)
                where = (torch.arange(prompt, device=cosine.device) * NUM_BINS) // prompt
                total = torch.zeros(NUM_BINS, dtype=torch.float64, device=cosine.device).index_add_(
                    0, where, cosine
                )
                self._similarity[kind, rows.layer] += (
                    (total / where.bincount(minlength=NUM_BINS)).cpu().numpy()
                )
        self._below = rows
        self.prompts[rows.layer] += 1

    def _window_loss(self, rows: LayerObservation) -> np.ndarray:
        mass = rows.dense_probs.mean(dim=0).double()
        mass[:, : self.num_sinks] = 0.0
        upto = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
        losses = []
        for fraction in FRACTIONS:
            start = (rows.positions * fraction).floor().long()
            start = torch.minimum(start, (rows.positions + 1 - self.num_local).clamp(min=0))
            losses.append(float(upto.gather(1, start[:, None]).mean()))
        return np.array(losses)

    @staticmethod
    def _share_loss(rows: LayerObservation, below: torch.Tensor, prompt: int) -> np.ndarray:
        heads = rows.keys.shape[1]
        packed = rows.query[0].reshape(heads, -1, rows.query.shape[-1])
        ours = torch.matmul(packed, rows.keys[0].transpose(-1, -2)) * rows.scale
        theirs = torch.matmul(packed, below[0].transpose(-1, -2)) * rows.scale
        dense = rows.dense_probs.reshape(ours.shape)
        hidden = ~rows.visible.repeat(packed.shape[1] // rows.visible.shape[0], 1)
        losses = [0.0]
        for fraction in FRACTIONS[1:]:
            end = int(fraction * prompt)
            mixed = torch.cat([theirs[..., :end], ours[..., end:]], dim=-1).masked_fill(hidden, -torch.inf)
            losses.append(float((dense - mixed.softmax(-1)).clamp(min=0).sum(-1).mean()))
        return np.array(losses)

    @property
    def window_loss(self) -> np.ndarray:
        return self._window / np.maximum(self.prompts, 1)[:, None]

    @property
    def share_loss(self) -> np.ndarray:
        return self._share / np.maximum(self.prompts, 1)[:, None]

    @property
    def similarity(self) -> np.ndarray:
        """`[2, L, NUM_BINS]`, keys then values; layer 0 has no layer below and is NaN."""
        result = self._similarity / np.maximum(self.prompts, 1)[:, None]
        result[:, 0] = np.nan
        return result

"""CIS, clustered indices sharing: retrieve at anchor steps, reuse the set while queries stay close.

arXiv 2602.08329, the time axis. The same walk serves one decode step and a run of teacher-forced steps:
a run only fills more rows of the same tables, so both give the same sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from prhs_kernels.ops.retrieve import reference as retrieve
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind, dequantise, quantise
from prhs_kernels.ops.sparse_decode.reference import grouped_scores
from prhs_kernels.params import Gate, SelectorParams, TimeParams
from prhs_kernels.selectors.base import Rows


@dataclasses.dataclass
class AnchorState:
    """What one layer remembers between decode steps. `heads` means `[batch, num_kv_heads]`.

    query, query_pre: `[batch, num_kv_heads, group, head_dim]`, the anchor's queries with and without RoPE.
    slot: heads int64, cache slot of the anchor; -1 where there is none.
    block_start: heads int64, slot at which the current block of steps began.
    middle: `[batch, num_kv_heads, n]` bool, the dilated set.
    """

    query: torch.Tensor
    query_pre: torch.Tensor
    slot: torch.Tensor
    block_start: torch.Tensor
    middle: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Selection:
    """Sets of a run of steps.

    kept: `[batch, num_kv_heads, steps, n]` bool.
    retrieved: `[batch, num_kv_heads, steps]` bool, a scan of the keys was needed.
    contested: like `retrieved`, True where per-step top-k would have had to scan (the budget did not cover
        all candidates); the denominator of the retrieval ratio.
    gated: like `retrieved`, True where the cosine with the anchor had to be evaluated.
    """

    kept: torch.Tensor
    retrieved: torch.Tensor
    contested: torch.Tensor
    gated: torch.Tensor

    def rows(self, which: torch.Tensor) -> Selection:
        """Some sequences of the batch; `which` `[batch]` bool."""
        return Selection(self.kept[which], self.retrieved[which], self.contested[which], self.gated[which])


Scores = Callable[[], torch.Tensor]  # -> [batch, num_kv_heads, group, steps, n], computed only when needed


def middle_budget(time: TimeParams, layer: int, num_visible: torch.Tensor) -> torch.Tensor:
    """Middle positions a retrieval may keep: `[batch, num_kv_heads, steps]` int64.

    `num_visible` `[batch, steps]`: positions that dense attention of the step covers.
    """
    ratio = time.budget_ratio[layer].to(num_visible.device).double()
    tokens = time.budget_tokens[layer].to(num_visible.device).long()
    budget = (ratio[None, :, None] * num_visible[:, None, :]).floor().long() + tokens[None, :, None]
    return torch.where((ratio >= 1)[None, :, None], num_visible[:, None, :], budget)


def scan_scores(query: torch.Tensor, keys: torch.Tensor, scale: float, kind: KeyCopyKind) -> torch.Tensor:
    """The scaled dot products that a scan sees: of the keys, or of their low-bit copy.

    Args:
        query: `[batch, num_qo_heads, steps, head_dim]`; keys: `[batch, num_kv_heads, n, head_dim]`.

    Returns:
        `[batch, num_kv_heads, group, steps, n]`, in fp32 or wider. A key's copy depends on that key alone.
    """
    if kind == KeyCopyKind.EXACT:
        return grouped_scores(query, keys, scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    copy = dequantise(*quantise(keys, kind), kind).to(wide)
    return grouped_scores(query.to(wide), copy, scale)


def select(
    query: torch.Tensor,
    query_pre: torch.Tensor,
    scores: Scores,
    candidates: torch.Tensor,
    rows: Rows,
    params: SelectorParams,
    layer: int,
    state: AnchorState | None,
) -> tuple[Selection, AnchorState]:
    """Choose the kept set of every step of a run and the state that the next run starts from.

    Args:
        query, query_pre: `[batch, num_qo_heads, steps, head_dim]`, after and before RoPE.
        scores: gives the scaled dot products `[batch, num_kv_heads, group, steps, n]` that a scan sees, of
            the keys or of their low-bit copy (`scan_scores`); called only if some step retrieves.
        candidates: `[batch, steps, n]` bool, what PSAW leaves.
        state: what the previous run of this layer returned, or None after a prefill.
    """
    time = params.time
    assert time is not None
    batch, steps, n = candidates.shape
    sinks, middle = _parts(candidates, rows, params)
    budget = middle_budget(time, layer, rows.num_visible)
    contested = budget < middle.sum(dim=-1)[:, None, :]

    packed = query.reshape(batch, params.num_kv_heads, -1, steps, query.shape[-1])
    packed_pre = query_pre.reshape(packed.shape)
    cosine = _anchor_cosine(packed, packed_pre, time, layer, state)
    walk = _walk(cosine, contested, rows.slots, time, layer, state)

    # table 0 is the carried anchor's, table 1 + i that of a retrieval at step i
    sets = torch.zeros(*contested.shape[:2], 1 + steps, n, dtype=torch.bool, device=candidates.device)
    slots = rows.slots.expand(contested.shape)
    slots = torch.cat(
        [torch.full_like(slots[..., :1], -1) if state is None else state.slot[..., None], slots], -1
    )
    if state is not None:
        sets[:, :, 0, : state.middle.shape[-1]] = state.middle
    if bool(walk.retrieved.any()):
        _retrieve(sets, scores, candidates, middle, budget, walk.retrieved, time, layer)

    index = walk.uses.clamp(min=0)
    chosen = sets.gather(2, index[..., None].expand(-1, -1, -1, n)) & candidates[:, None]
    # local grows until the next anchor: what left the window since then was never scored for this set
    since_anchor = (
        torch.arange(n, device=slots.device) > (slots.gather(2, index) - params.num_local)[..., None]
    )
    partial = chosen | sinks[:, None] | (since_anchor & candidates[:, None])
    kept = torch.where(contested[..., None], partial, candidates[:, None])
    selection = Selection(kept, walk.retrieved, contested, walk.gated)
    return selection, _carry(packed, packed_pre, sets, slots, walk, state)


def _parts(candidates: torch.Tensor, rows: Rows, params: SelectorParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and middle of the candidates, each `[batch, steps, n]` bool; the rest of them is local."""
    sinks = candidates & (rows.key_positions()[:, None, :] < params.num_sinks)
    keys = torch.arange(candidates.shape[-1], device=candidates.device)
    local = keys > rows.slots[None, :, None] - params.num_local
    return sinks, candidates & ~sinks & ~local


def _anchor_cosine(
    query: torch.Tensor, query_pre: torch.Tensor, time: TimeParams, layer: int, state: AnchorState | None
) -> torch.Tensor:
    """Cosine of each step with the carried anchor (0) and every step (1 + i), the smallest in the group.

    `[batch, num_kv_heads, steps, 1 + steps]` float64; -2, below every threshold, for heads that never share.
    """
    batch, heads, _, steps, _ = query.shape
    cosine = query.new_full((batch, heads, steps, 1 + steps), -2.0, dtype=torch.float64)
    gates = time.gate[layer].tolist()
    for gate, current, carried in (
        (Gate.POST_ROPE, query, state.query if state else None),
        (Gate.PRE_ROPE, query_pre, state.query_pre if state else None),
    ):
        chosen = [head for head in range(heads) if gates[head] == gate]
        if not chosen:
            continue
        unit = torch.nn.functional.normalize(current[:, chosen].double(), dim=-1)
        if carried is None:
            first = torch.zeros_like(unit[..., :1, :])
        else:
            first = torch.nn.functional.normalize(carried[:, chosen].double(), dim=-1).unsqueeze(3)
        anchors = torch.cat([first, unit], dim=3)
        # rounding may not take it above 1: a threshold of 1 means never
        cosine[:, chosen] = torch.matmul(unit, anchors.transpose(-1, -2)).amin(dim=2).clamp(max=1.0)
    return cosine


class _Walk(NamedTuple):
    """Who retrieves when. Tables are numbered 0: the carried set, 1 + i: retrieved at step i, -1: none.

    uses: `[batch, num_kv_heads, steps]` int64, the table of each step; retrieved, gated: bool, same shape.
    block_start, anchor: `[batch, num_kv_heads]` int64, slot and table that the next run starts from.
    """

    uses: torch.Tensor
    retrieved: torch.Tensor
    gated: torch.Tensor
    block_start: torch.Tensor
    anchor: torch.Tensor


def _walk(
    cosine: torch.Tensor,
    contested: torch.Tensor,
    slots: torch.Tensor,
    time: TimeParams,
    layer: int,
    state: AnchorState | None,
) -> _Walk:
    """Decide step by step, on the host; the result is on the device of `contested`."""
    table, needed, at = cosine.cpu().numpy(), contested.cpu().numpy(), slots.cpu().numpy()
    tau = time.tau_cos[layer].double().cpu().numpy()[None, :]
    block = time.block[layer].cpu().numpy()[None, :]
    may_share = (time.gate[layer].cpu().numpy() != Gate.NEVER)[None, :]
    batch, head = np.indices(needed.shape[:2])
    if state is None:
        anchor, start = np.full(batch.shape, -1), np.full(batch.shape, -1)
    else:
        anchor = np.where(state.slot.cpu().numpy() >= 0, 0, -1)
        start = state.block_start.cpu().numpy().copy()
    uses = np.full(needed.shape, -1)
    retrieved, gated = np.zeros(needed.shape, dtype=bool), np.zeros(needed.shape, dtype=bool)
    for step in range(needed.shape[2]):
        want = needed[:, :, step]
        new_block = (anchor < 0) | (at[step] - start >= block)
        ask = want & may_share & ~new_block
        share = ask & (table[batch, head, step, np.maximum(anchor, 0)] > tau)
        fetch = want & ~share
        uses[:, :, step] = np.where(share, anchor, np.where(fetch, step + 1, -1))
        retrieved[:, :, step], gated[:, :, step] = fetch, ask
        becomes_anchor = fetch & (new_block | time.reanchor)
        # a step that needs no choice keeps everything and ends the block
        anchor = np.where(becomes_anchor, step + 1, np.where(want, anchor, -1))
        start = np.where(becomes_anchor, at[step], start)
    return _Walk(*(torch.from_numpy(a).to(contested.device) for a in (uses, retrieved, gated, start, anchor)))


def _retrieve(
    sets: torch.Tensor,
    scores: Scores,
    candidates: torch.Tensor,
    middle: torch.Tensor,
    budget: torch.Tensor,
    retrieved: torch.Tensor,
    time: TimeParams,
    layer: int,
) -> None:
    """Fill `sets[:, :, 1 + step]` for every step that retrieves."""
    b, h, t = retrieved.nonzero(as_tuple=True)
    picked = scores().transpose(2, 3)[b, h, t]  # [rows, group, n]
    weights = retrieve.importance(picked, candidates[b, t])
    allowed, count = middle[b, t], budget[b, h, t]
    ranks = retrieve.top_positions(weights, allowed, count)
    radius = time.dilation[layer].to(h.device)[h]
    sets[b, h, t + 1] = retrieve.dilate(ranks, count, radius, allowed)


def _carry(
    query: torch.Tensor,
    query_pre: torch.Tensor,
    sets: torch.Tensor,
    slots: torch.Tensor,
    walk: _Walk,
    state: AnchorState | None,
) -> AnchorState:
    """State after the run: the last anchor of each head, or none."""
    index = walk.anchor.clamp(min=0)

    def last(steps_of: torch.Tensor, carried: torch.Tensor | None) -> torch.Tensor:
        # [b, h, group, steps, d] with the carried anchor put in front
        first = torch.zeros_like(steps_of[:, :, :, :1]) if carried is None else carried.unsqueeze(3)
        table = torch.cat([first, steps_of], dim=3)
        where = index[:, :, None, None, None].expand(-1, -1, table.shape[2], 1, table.shape[4])
        return table.gather(3, where).squeeze(3)

    slot = slots.gather(2, index[..., None]).squeeze(-1)
    return AnchorState(
        query=last(query, state.query if state else None),
        query_pre=last(query_pre, state.query_pre if state else None),
        slot=torch.where(walk.anchor >= 0, slot, -1),
        block_start=walk.block_start,
        middle=sets.gather(2, index[..., None, None].expand(-1, -1, 1, sets.shape[-1])).squeeze(2),
    )

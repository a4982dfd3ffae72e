"""CIS, clustered indices sharing: retrieve at anchor steps, reuse the set while queries stay close.

arXiv 2602.08329, the time axis. The same walk serves one decode step and a run of teacher-forced steps:
a run only fills more rows of the same tables, so both give the same sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from prhs_kernels.ops.retrieve import reference as retrieve
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
    gated: like `retrieved`, True where the cosine was evaluated.
    """

    kept: torch.Tensor
    retrieved: torch.Tensor
    contested: torch.Tensor
    gated: torch.Tensor


Scores = Callable[[], torch.Tensor]  # -> [batch, num_kv_heads, group, steps, n], computed only when needed


def middle_budget(time: TimeParams, layer: int, kv_len: torch.Tensor) -> torch.Tensor:
    """Positions a retrieval may keep: `[batch, num_kv_heads, steps]` int64 for `kv_len` `[batch, steps]`."""
    ratio = time.budget_ratio[layer].to(kv_len.device).double()
    tokens = time.budget_tokens[layer].to(kv_len.device).long()
    budget = (ratio[None, :, None] * kv_len[:, None, :]).floor().long() + tokens[None, :, None]
    return torch.where((ratio >= 1)[None, :, None], kv_len[:, None, :], budget)


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
        scores: gives the scaled dot products `[batch, num_kv_heads, group, steps, n]`; called only if some
            step retrieves.
        candidates: `[batch, steps, n]` bool, what PSAW leaves.
        state: what the previous run of this layer returned, or None after a prefill.
    """
    time = params.time
    assert time is not None
    batch, steps, n = candidates.shape
    heads = params.num_kv_heads
    keys = torch.arange(n, device=candidates.device)
    key_positions = rows.key_positions()[:, None, :]
    sinks = candidates & (key_positions < params.num_sinks)
    local = candidates & (keys > rows.slots[None, :, None] - params.num_local)
    middle = candidates & ~sinks & ~local
    num_middle = middle.sum(dim=-1)
    budget = middle_budget(time, layer, rows.positions.clamp(min=0) + 1)
    contested = budget < num_middle[:, None, :]

    packed = query.reshape(batch, heads, -1, steps, query.shape[-1])
    packed_pre = query_pre.reshape(packed.shape)
    cosine = _anchor_cosine(packed, packed_pre, time, layer, state)
    anchor, retrieved, block_start = _walk(cosine, contested, rows.slots, time, layer, params, state)

    sets = torch.zeros(batch, heads, 1 + steps, n, dtype=torch.bool, device=candidates.device)
    if state is not None:
        sets[:, :, 0, : state.middle.shape[-1]] = state.middle
    if bool(retrieved.any()):
        _retrieve(sets, scores, candidates, middle, budget, retrieved, time, layer)

    index = anchor.clamp(min=0)
    chosen = sets.gather(2, index[..., None].expand(-1, -1, -1, n)) & candidates[:, None]
    slots = torch.cat(
        [state.slot[..., None] if state else -torch.ones_like(anchor[..., :1]), _per_head(rows, anchor)],
        dim=-1,
    )
    anchor_slot = slots.gather(2, index)
    growing = keys > (anchor_slot - params.num_local)[..., None]  # local grows until the next anchor
    partial = chosen | sinks[:, None] | (growing & candidates[:, None])
    kept = torch.where(contested[..., None], partial, candidates[:, None])
    gated = contested & ~_forced(time, layer, contested)
    new_state = _carry(packed, packed_pre, sets, slots, anchor, block_start, contested, state)
    return Selection(kept, retrieved, contested, gated), new_state


def _per_head(rows: Rows, like: torch.Tensor) -> torch.Tensor:
    return rows.slots.expand(like.shape)


def _forced(time: TimeParams, layer: int, like: torch.Tensor) -> torch.Tensor:
    never = (time.gate[layer] == Gate.NEVER) | (time.block[layer] <= 1)
    return never.to(like.device)[None, :, None].expand(like.shape)


def _anchor_cosine(
    query: torch.Tensor, query_pre: torch.Tensor, time: TimeParams, layer: int, state: AnchorState | None
) -> torch.Tensor:
    """Smallest cosine in the group of each step with the carried anchor (0) and every step: `[b, h, steps, 1 + steps]`."""
    heads = query.shape[1]
    cosine = query.new_full(
        (query.shape[0], heads, query.shape[3], 1 + query.shape[3]), -2.0, dtype=torch.float64
    )
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
        cosine[:, chosen] = torch.matmul(unit, anchors.transpose(-1, -2)).amin(dim=2)
    return cosine


def _walk(
    cosine: torch.Tensor,
    contested: torch.Tensor,
    slots: torch.Tensor,
    time: TimeParams,
    layer: int,
    params: SelectorParams,
    state: AnchorState | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decide step by step who retrieves.

    Returns, on the device of `contested`: the set each step uses `[b, h, steps]` int64 (0: the carried one,
    i + 1: retrieved at step i, -1: none needed), who retrieves (bool, same shape), and the final block starts `[b, h]`.
    """
    table, needed, at = cosine.cpu().numpy(), contested.cpu().numpy(), slots.cpu().numpy()
    tau = time.tau_cos[layer].double().numpy()[None, :]
    block = time.block[layer].numpy()[None, :]
    may_share = (time.gate[layer].numpy() != Gate.NEVER)[None, :]
    shape = needed.shape[:2]
    rows = np.indices(shape)
    if state is None:
        current, anchor_slot = np.full(shape, -1), np.full(shape, -1)
        start = np.full(shape, -1)
    else:
        anchor_slot, start = state.slot.cpu().numpy().copy(), state.block_start.cpu().numpy().copy()
        current = np.where(anchor_slot >= 0, 0, -1)
    uses = np.full(needed.shape, -1)
    retrieved = np.zeros(needed.shape, dtype=bool)
    for step in range(needed.shape[2]):
        want = needed[:, :, step]
        new_block = (current < 0) | (at[step] - start >= block)
        close = table[rows[0], rows[1], step, np.maximum(current, 0)] > tau
        share = want & may_share & ~new_block & close
        fetch = want & ~share
        uses[:, :, step] = np.where(share, current, np.where(fetch, step + 1, -1))
        retrieved[:, :, step] = fetch
        becomes_anchor = fetch & (new_block | time.reanchor)
        current = np.where(becomes_anchor, step + 1, np.where(want, current, -1))
        start = np.where(becomes_anchor, at[step], start)
    device = contested.device
    final = torch.from_numpy(start).to(device)
    uses_t, retrieved_t = torch.from_numpy(uses).to(device), torch.from_numpy(retrieved).to(device)
    return uses_t, retrieved_t, torch.stack([final, torch.from_numpy(current).to(device)])


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
    anchor: torch.Tensor,
    ends: torch.Tensor,
    contested: torch.Tensor,
    state: AnchorState | None,
) -> AnchorState:
    """State after the run: the last anchor of each head, or none."""
    block_start, current = ends[0], ends[1]
    index = current.clamp(min=0)

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
        slot=torch.where(current >= 0, slot, -1),
        block_start=block_start,
        middle=sets.gather(2, index[..., None, None].expand(-1, -1, 1, sets.shape[-1])).squeeze(2),
    )

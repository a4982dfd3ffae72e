"""One decode step of retrieval in plain PyTorch: what the kernels must do, on the same state."""

from __future__ import annotations

import torch

from prhs_kernels.ops.audit.state import LayerAudit
from prhs_kernels.ops.retrieve import reference
from prhs_kernels.ops.retrieve.key_copy import KeyCopy, dequantise
from prhs_kernels.ops.retrieve.state import Decision, RetrievalRule, RetrievalState
from prhs_kernels.ops.spans import span_mask
from prhs_kernels.params import Gate


def retrieve_step(
    query: torch.Tensor,
    query_pre: torch.Tensor,
    keys: torch.Tensor,
    spans: torch.Tensor,
    budget: torch.Tensor,
    rule: RetrievalRule,
    state: RetrievalState,
    scale: float,
    key_copy: KeyCopy | None = None,
    audit: LayerAudit | None = None,
) -> None:
    """Arguments as in `api.retrieve`; `state` and `audit` are updated in place."""
    batch, num_kv_heads, n, head_dim = keys.shape
    packed, packed_pre = (q.reshape(batch, num_kv_heads, -1, head_dim) for q in (query, query_pre))
    candidates = span_mask(spans, n)
    sinks, middle, local = _parts(spans, n, rule.num_local)
    pre = (rule.gate == Gate.PRE_ROPE)[None, :, None, None]
    current = torch.where(pre, packed_pre, packed)

    contested = budget < middle.sum(dim=-1)[:, None]
    shares = contested & _may_share(current, spans, rule, state)
    retrieves = contested & ~shares

    exact = _scores(packed, keys, candidates, scale)
    if audit is not None:
        scans = (audit.coin == 1) & (shares if key_copy is None else contested)
        audit.lse.copy_(torch.where(scans[..., None], exact.logsumexp(dim=-1), audit.lse))
    scores = exact
    if key_copy is not None:
        copied = dequantise(key_copy.data[:, :, :n], key_copy.scale[:, :, :n], key_copy.kind)
        scores = _scores(packed.float(), copied, candidates, scale)
    state.lse.copy_(torch.where(retrieves[..., None], scores.logsumexp(dim=-1), state.lse))
    weights = reference.importance(scores, candidates[:, None]).nan_to_num()  # NaN: no candidate at all
    allowed = middle[:, None].expand(weights.shape)
    wanted = torch.where(retrieves, budget, 0).long()
    chosen = reference.dilate(
        reference.top_positions(weights, allowed, wanted),
        wanted,
        rule.dilation.expand(batch, -1),
        allowed,
    )
    fresh = torch.where(retrieves[..., None], chosen | (sinks | local)[:, None], candidates[:, None])
    _store(state, fresh, ~shares)
    _append(state, (spans[:, 3] - 1)[:, None].expand(batch, num_kv_heads), shares)
    state.anchor_query.copy_(torch.where(retrieves[..., None, None], current, state.anchor_query))
    slot = (spans[:, 3] - 1)[:, None]
    anchor = torch.where(retrieves, slot, torch.where(shares, state.anchor_slot, -1))
    state.anchor_slot.copy_(anchor)
    decision = torch.where(shares, int(Decision.SHARE), int(Decision.KEEP_ALL))
    state.decision.copy_(torch.where(retrieves, int(Decision.RETRIEVE), decision))


def _scores(packed: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor, scale: float) -> torch.Tensor:
    """`[batch, num_kv_heads, group, n]`, fp32 or wider, -inf outside of the candidates."""
    wide = torch.promote_types(packed.dtype, torch.float32)
    scores = torch.matmul(packed, keys.transpose(-1, -2)).to(wide) * scale
    return scores.masked_fill(~candidates[:, None, None, :], -torch.inf)


def _parts(spans: torch.Tensor, n: int, num_local: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sinks, middle and local of the candidates, each `[batch, n]` bool."""
    slots = torch.arange(n, device=spans.device)[None, :]
    first, sink_end, begin, end = (spans[:, i, None] for i in range(4))
    split = torch.maximum(begin, end - num_local)
    sinks = (slots >= first) & (slots < sink_end)
    return sinks, (slots >= begin) & (slots < split), (slots >= split) & (slots < end)


def _may_share(
    current: torch.Tensor, spans: torch.Tensor, rule: RetrievalRule, state: RetrievalState
) -> torch.Tensor:
    """`[batch, num_kv_heads]` bool: inside a block, room for one more index, close to the anchor's query."""
    unit, anchor = (torch.nn.functional.normalize(q.double(), dim=-1) for q in (current, state.anchor_query))
    cosine = (unit * anchor).sum(dim=-1).amin(dim=-1).clamp(max=1.0)
    since = spans[:, 3, None] - 1 - state.anchor_slot
    in_block = (state.anchor_slot >= 0) & (since < rule.block)
    has_room = state.count < state.indices.shape[-1]
    return in_block & has_room & (rule.gate != Gate.NEVER) & (cosine > rule.tau_cos)


def _store(state: RetrievalState, kept: torch.Tensor, rows: torch.Tensor) -> None:
    """Write the sets of `rows` as ascending indices."""
    n, capacity = kept.shape[-1], state.indices.shape[-1]
    order = torch.arange(n, device=kept.device).masked_fill(~kept, n).sort(dim=-1).values[..., :capacity]
    width = order.shape[-1]
    old = state.indices[..., :width]
    old.copy_(torch.where(rows[..., None], order.masked_fill(order == n, -1).int(), old))
    state.count.copy_(torch.where(rows, kept.sum(dim=-1).clamp(max=capacity), state.count))


def _append(state: RetrievalState, slot: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the newest slot to the sets of `rows`."""
    place = state.count.long().clamp(max=state.indices.shape[-1] - 1).unsqueeze(-1)
    old = state.indices.gather(-1, place)
    state.indices.scatter_(-1, place, torch.where(rows[..., None], slot[..., None].int(), old))
    state.count.add_(rows.int())

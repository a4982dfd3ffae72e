"""The attention function that transformers calls, and what an observer of a scoring pass gets to see."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from prhs_kernels.errors import UsageError
from prhs_kernels.ops.retrieve.key_copy import KeyCopyKind
from prhs_kernels.ops.sparse_decode import reference as decode
from prhs_kernels.runtime.cache import PrhsCache
from prhs_kernels.runtime.prompt_attention import dense_attention, prompt_attention
from prhs_kernels.selectors import cis
from prhs_kernels.selectors.base import Rows, candidates
from prhs_kernels.selectors.baselines.rows import DecodeRows
from prhs_kernels.selectors.memory import PromptRows


@dataclasses.dataclass(frozen=True)
class LayerObservation:
    """One layer of a scoring pass over one unpadded sequence; `steps` decode steps, `n` positions.

    query, query_pre: `[1, num_qo_heads, steps, head_dim]`, after and before RoPE.
    keys, values: `[1, num_kv_heads, n, head_dim]`, as the sparse model uses them; key i is position i.
    positions: `[steps]` int64 of the queries. scale: what dot products are multiplied by.
    dense_probs: `[num_qo_heads, steps, n]` fp32, dense attention of these queries over unfrozen keys.
    sparse_probs: the same shape, what this model attends with.
    visible: `[steps, n]` bool, what dense attention covers.
    kept: `[num_kv_heads, steps, n]` bool; retrieved, contested: `[num_kv_heads, steps]` bool.
    prompts: layer -> its prefill, where the pass keeps the prompt's queries.
    """

    layer: int
    query: torch.Tensor
    query_pre: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scale: float
    dense_probs: torch.Tensor
    sparse_probs: torch.Tensor
    visible: torch.Tensor
    kept: torch.Tensor
    retrieved: torch.Tensor
    contested: torch.Tensor
    prompts: dict[int, PromptRows] = dataclasses.field(default_factory=dict)


PREFILL_SAMPLES = 64  # prompt rows per layer whose loss is measured in a scoring pass

Observer = Callable[[LayerObservation], None]


def unrotate(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo the rotary embedding, up to a positive factor (which no cosine sees).

    Args:
        query: `[batch, num_qo_heads, tokens, head_dim]` after RoPE; cos, sin: `[batch, tokens, head_dim]`.
    """
    half = query.shape[-1] // 2
    turned = torch.cat([-query[..., half:], query[..., :half]], dim=-1)
    return query * cos.unsqueeze(1) - turned * sin.unsqueeze(1)


def attention_forward(
    cache: PrhsCache,
    observer: Observer | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, shapes as in `AttentionInterface`; gives `[batch, tokens, heads, head_dim]`."""
    layer = module.layer_idx
    assert isinstance(layer, int) and cache.forward is not None
    params = cache.params
    steps = query.shape[2]
    if cache.forward.is_prefill:
        cache.note_prompt(layer, query, key, scaling, sliding_window)
    if params.is_dense and observer is None and cache.selector is None:
        if not cache.forward.is_prefill:
            _count_dense(cache, steps, key, sliding_window)
        return dense_attention(cache, module, query, key, value, sliding_window, scaling, **kwargs), None
    rows = cache.rows(steps, key.shape[2], sliding_window)
    if cache.forward.is_prefill:
        if observer is not None:
            _measure_prefill(cache, layer, query, key, rows, scaling)
        return prompt_attention(cache, module, query, key, value, rows, scaling, **kwargs), None
    return _decode(cache, observer, layer, query, key, value, rows, scaling).transpose(1, 2), None


def _count_dense(cache: PrhsCache, steps: int, key: torch.Tensor, sliding_window: int | None) -> None:
    assert cache.forward is not None
    last = cache.forward.first_slot + torch.arange(1, steps + 1, device=key.device)
    seen = (last[None, :] - cache.forward.padding[:, None]).clamp(min=0)
    if sliding_window is not None:
        seen = seen.clamp(max=sliding_window)
    cache.stats.add_dense(seen if cache.alive is None else seen[cache.alive], key.shape[1])


def _measure_prefill(
    cache: PrhsCache, layer: int, query: torch.Tensor, key: torch.Tensor, rows: Rows, scaling: float
) -> None:
    """Record the loss of evenly spaced prompt rows: total variation to dense attention over unfrozen keys."""
    unfrozen = cache.unfrozen_keys.get(layer)
    params = cache.params
    if unfrozen is None and (
        params.depth is None or not params.depth.window_fraction(layer, params.num_layers)
    ):
        return
    picked = (
        torch.linspace(0, query.shape[2] - 1, min(PREFILL_SAMPLES, query.shape[2])).long().to(query.device)
    )
    some = dataclasses.replace(rows, slots=rows.slots[picked])
    scores = decode.grouped_scores(query[:, :, picked], key, scaling)
    allowed = candidates(some, params, layer)
    dense = _dense_probs(query[:, :, picked], scores, some.visible(), unfrozen, scaling)
    sparse = scores.masked_fill(~allowed[:, None, None], -torch.inf).softmax(dim=-1)
    cache.prefill_dropped[layer] = (dense - sparse).clamp(min=0).sum(-1).mean(-1).flatten()


def _decode(
    cache: PrhsCache,
    observer: Observer | None,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scaling: float,
) -> torch.Tensor:
    forward = cache.forward
    assert forward is not None and forward.cos is not None and forward.sin is not None
    visible = rows.visible()
    query_pre = unrotate(query, forward.cos, forward.sin)
    table: list[torch.Tensor] = []

    def scores() -> torch.Tensor:
        if not table:
            table.append(decode.grouped_scores(query, key, scaling))
        return table[0]

    if cache.selector is None:
        kept, retrieved, contested = _own_sets(cache, layer, query, query_pre, key, scores, rows, scaling)
        if cache.auditor is not None:
            cache.auditor.add(scores, kept, retrieved, visible, cache.alive)
    else:
        _check_single(rows, "a comparison selector")
        dense = _dense_probs(query, scores(), visible, None, scaling)
        positions = rows.positions[0]
        start = None if rows.sliding_window is None else positions + 1 - rows.sliding_window
        choice = cache.selector.choose(
            DecodeRows(
                query[0], key[0], dense[0].flatten(0, 1), positions, start, layer, scaling, cache.memory
            )
        )
        cache.stats.add_choice(choice, visible)
        kept, retrieved, contested = choice.kept[None], choice.retrieved[None], choice.contested[None]
    if query.shape[2] == 1 and observer is None:
        indices, _ = decode.kept_indices(kept.squeeze(2))
        return decode.sparse_decode(query, key, value, indices, scaling)[0]
    # scoring never meets padding queries; a padded row would see nothing and softmax to NaN
    probs = scores().masked_fill(~kept.unsqueeze(2), -torch.inf).softmax(dim=-1)
    if observer is not None:
        _check_single(rows, "a scoring pass")
        dense = _dense_probs(query, scores(), visible, cache.unfrozen_keys.get(layer), scaling)
        observer(
            LayerObservation(
                layer=layer,
                query=query,
                query_pre=query_pre,
                keys=key,
                values=value,
                positions=rows.slots,
                scale=scaling,
                dense_probs=dense[0].flatten(0, 1),
                sparse_probs=probs[0].flatten(0, 1),
                visible=visible[0],
                kept=kept[0],
                retrieved=retrieved[0],
                contested=contested[0],
                prompts=cache.memory.prompts,
            )
        )
    return decode.attend(probs, value)


def _own_sets(
    cache: PrhsCache,
    layer: int,
    query: torch.Tensor,
    query_pre: torch.Tensor,
    key: torch.Tensor,
    scores: cis.Scores,
    rows: Rows,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kept`, `retrieved` and `contested` of `cis.Selection` under the time and depth axes, and counted."""
    params = cache.params
    allowed = candidates(rows, params, layer)
    selection: cis.Selection | None = None
    if params.time is not None:
        state = cache.selective(layer)
        if params.key_copy != KeyCopyKind.EXACT:
            scores = functools.partial(cis.scan_scores, query, key, scaling, params.key_copy)
        selection, state.anchor = cis.select(
            query, query_pre, scores, allowed, rows, params, layer, state.anchor
        )
        kept, retrieved, contested = selection.kept, selection.retrieved, selection.contested
    else:
        kept = allowed[:, None].expand(-1, params.num_kv_heads, -1, -1)
        retrieved = contested = torch.zeros(kept.shape[:3], dtype=torch.bool, device=kept.device)
    counted = (kept, rows.visible(), allowed, selection)
    if cache.alive is not None:
        kept_alive, visible, candidates_alive = (table[cache.alive] for table in counted[:3])
        selection = selection and selection.rows(cache.alive)
        counted = (kept_alive, visible, candidates_alive, selection)
    cache.stats.add(*counted, params.group_size, params.scan_row)
    return kept, retrieved, contested


def _check_single(rows: Rows, who: str) -> None:
    if rows.padding.shape[0] != 1 or bool(rows.padding.any()):
        raise UsageError(f"{who} takes one unpadded sequence")


def _dense_probs(
    query: torch.Tensor,
    scores: torch.Tensor,
    visible: torch.Tensor,
    unfrozen: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Dense attention of the queries in use over the keys in use, but `unfrozen` ones for a frozen prefix."""
    if unfrozen is not None:
        prefix = decode.grouped_scores(query, unfrozen, scale)
        scores = torch.cat([prefix, scores[..., prefix.shape[-1] :]], dim=-1)
    return scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
